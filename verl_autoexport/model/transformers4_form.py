"""Tokenizer, processor and templates in the form that transformers 4 reads, and 5 as well."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl_autoexport.errors import PlanError
from verl_autoexport.model.asset_facts import PARTS
from verl_autoexport.system.untrusted import is_plain_name, read_json

LEGACY_TEMPLATE = "chat_template.json"
"""A processor's template before `chat_template.jinja`; transformers 5 prefers it if it exists."""
TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_TOKENIZER, _PROCESSOR = "tokenizer_config.json", "processor_config.json"
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}
_OF_THE_SAVE = ("is_local", "local_files_only")
_ADD_TOKENS = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"}
"""Classes whose bos and eos transformers 4 adds by a setting, whatever `tokenizer.json` says."""


@contextmanager
def tried(directory: Path, names: tuple[str, ...]) -> Iterator[Callable[[bool], None]]:
    """Keeps the files written inside only if the yielded function is called with True."""
    before = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
    good: list[bool] = []
    yield good.append
    if not any(good):
        for name, content in before.items():
            (directory / name).write_bytes(content)


def write_tokenizer(directory: Path, base: Path | None, facts: Mapping[str, Any]) -> None:
    """Rewrites `tokenizer_config.json`; `facts` are the tokenizer's, `base` has a published tokenizer."""
    path = directory / _TOKENIZER
    config = {key: value for key, value in _read(path).items() if key not in _OF_THE_SAVE}
    theirs = _read(base / _TOKENIZER) if base else {}
    if not config:
        return
    name = config.get("tokenizer_class")
    config["tokenizer_class"] = _CLASSES.get(str(name), name)
    if isinstance(extra := config.get("extra_special_tokens"), list):
        del config["extra_special_tokens"]
        if extra:
            config["additional_special_tokens"] = extra
    if name in _ADD_TOKENS or "add_bos_token" in theirs:
        first, last = (
            (ids or [None])[at] for ids, at in ((facts["ids of a probe"][0], 0), (facts["ids of a probe"][0], -1))
        )
        ids = facts["special ids"]
        config["add_bos_token"] = first is not None and first == ids.get("bos_token")
        config["add_eos_token"] = last is not None and last == ids.get("eos_token")
    _write(path, config)


def write_processor(directory: Path) -> None:
    """Writes the parts of `processor_config.json` also into their former separate files."""
    config = _read(directory / _PROCESSOR)
    for part, name in reversed(PARTS.items()):
        if isinstance(settings := config.get(part), dict) and not (directory / name).exists():
            kind = {key: config[key] for key in ("processor_class", "auto_map") if key in config}
            _write(directory / name, settings | kind)


def set_template(directory: Path, template: Any, base: Path | None, unchanged: bool) -> None:
    """Makes `template` (a text, texts by name, None) the tokenizer's; `unchanged`: the base's files are there."""
    path = directory / _TOKENIZER
    template = template if isinstance(template, str | Mapping) else None
    config, theirs = _read(path), _read(base / _TOKENIZER) if base else {}
    before = dict(config)
    inside = "chat_template" in config or "chat_template" in theirs
    if inside and template is not None:
        named = isinstance(template, Mapping)
        config["chat_template"] = [{"name": k, "template": v} for k, v in template.items()] if named else template
    else:
        config.pop("chat_template", None)
    if config != before:
        _write(path, config)
    if unchanged and (inside or (directory / TEMPLATE).exists()):
        return
    texts = template if isinstance(template, Mapping) else {} if template is None else {"default": template}
    for name, text in texts.items():
        if not is_plain_name(name):
            raise PlanError(f"{directory}: a chat template named {name!r:.100}, which is no name of a file.")
        target = directory / (TEMPLATE if name == "default" else f"{_TEMPLATES}/{name}.jinja")
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")


def set_processor_template(directory: Path, template: Any, legacy: bool) -> None:
    """Sets a processor's chat template; `legacy`: in the file that older readers read, and transformers 5 first."""
    path = directory / _PROCESSOR
    if "chat_template" in (config := _read(path)):
        del config["chat_template"]
        _write(path, config | ({"chat_template": template} if isinstance(template, str) else {}))
    path = directory / LEGACY_TEMPLATE
    if not isinstance(template, str) or (directory / _TEMPLATES).is_dir():
        path.unlink(missing_ok=True)  # the two may not exist together
    elif (legacy or not (directory / TEMPLATE).exists()) and _read(path).get("chat_template") != template:
        _write(path, {"chat_template": template})


def _read(path: Path) -> dict[str, Any]:
    """The content, or an empty dict for a missing or unreadable file, which is copied unchanged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
