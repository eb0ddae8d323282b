"""The observable facts about the tokenizer, the processor and the chat templates in a directory.

Two directories with equal facts give the same ids, tokens, templates and image settings,
whatever files they are written in. Transformers itself reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_autoexport.system.untrusted import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json",
)  # fmt: skip
"""Patterns of file names; any of these files makes a tokenizer."""
PROCESSOR_FILES = ("processor_config.json", "*preprocessor_config.json", "*image_processor_config.json")
PARTS = {
    "feature_extractor": "preprocessor_config.json",
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}
"""Parts of a `processor_config.json`, and their separate files in transformers 4."""
_PROBE = "Hello, world!\n  def f(x):\treturn 12345 * 0.5  # Größe, 漢字かな, Привет, مرحبا, 🙂🤖 <b>&amp;</b>\r\n"
_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_input_names")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf")
"""The name endings of weight files, which are no assets."""
_LARGE = 128 << 20  # bytes; weights in some other format, which no tokenizer reads
_REMEMBERED = 8
Facts = Mapping[str, Any]
_known: dict[tuple[str, AssetLoader], Facts] = {}


class Unreadable(Exception):
    """Transformers cannot load a tokenizer or processor here; the message gives the reason."""


def has_tokenizer(directory: Path) -> bool:
    return any(path.is_file() for pattern in TOKENIZER_FILES for path in directory.glob(pattern))


def has_processor(directory: Path) -> bool:
    return any(path.is_file() for pattern in PROCESSOR_FILES for path in directory.glob(pattern))


@dataclass(frozen=True)
class AssetLoader:
    """Tokenizers and processors as transformers loads them, with or without the code beside them."""

    trust_remote_code: bool = False

    def tokenizer_facts(self, directory: Path) -> Facts:
        """The facts that `AutoTokenizer` gives; `chat template` is one of them. Raises Unreadable.

        Large vocabularies take a second; a run's tokenizer stays the same, so the last facts are cached.
        """
        from transformers import AutoTokenizer

        key = _content(directory), self
        if key not in _known:
            while len(_known) >= _REMEMBERED:
                _known.pop(next(iter(_known)), None)
            try:
                _known[key] = _tokenizer_facts(self._load(AutoTokenizer, directory))
            except (Unreadable, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as e:  # custom code, or a panic of the tokenizers library
                raise Unreadable(f"{directory}: its tokenizer cannot be used: {_brief(e)}") from e
        return _known[key]

    def processor_facts(self, directory: Path) -> Facts:
        """The settings of `AutoProcessor`, without its chat template (see `processor_template`). Raises Unreadable."""
        from transformers import AutoProcessor

        found = self._load(AutoProcessor, directory)
        try:
            settings = json.loads(json.dumps(found.to_dict(), default=str)) if hasattr(found, "to_dict") else {}
        except Exception as e:  # custom code
            raise Unreadable(f"{directory}: its processor cannot be used: {_brief(e)}") from e
        return {"class": type(found).__name__, "settings": {k: v for k, v in settings.items() if k != "chat_template"}}

    def _load(self, auto: Any, directory: Path) -> Any:
        try:
            return auto.from_pretrained(directory, trust_remote_code=self.trust_remote_code, local_files_only=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # a panic of the tokenizers library is no Exception
            raise Unreadable(f"{directory}: {auto.__name__} cannot load it: {_brief(e)}") from e


def _content(directory: Path) -> str:
    """A digest of the names and bytes of all small files."""
    digest = hashlib.sha256()
    for path in sorted((*directory.iterdir(), *directory.glob("additional_chat_templates/*"))):
        if path.is_file() and not path.name.endswith(WEIGHTS):
            info = path.stat()
            content = path.read_bytes() if info.st_size < _LARGE else f"{info.st_size} {info.st_mtime_ns}".encode()
            digest.update(f"{path.name}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


def _tokenizer_facts(tokenizer: Any) -> Facts:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inside = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if value}
    text = _PROBE + "".join(map(str, tokenizer.all_special_tokens)) + _PROBE
    return {
        "class": type(tokenizer).__name__,
        "vocabulary and rules": _digest({k: v for k, v in inside.items() if k not in ("truncation", "padding")}),
        "special tokens": special,
        "special ids": {key: tokenizer.convert_tokens_to_ids(value) for key, value in special.items()},
        "added tokens": {id_: _token(token) for id_, token in sorted(tokenizer.added_tokens_decoder.items())},
        **{key: getattr(tokenizer, key, None) for key in _SETTINGS},
        "ids of a probe": [_encoded(tokenizer, text, special) for special in (True, False)],
        "chat template": _one(tokenizer.chat_template),
    }


def processor_files(directory: Path) -> Facts:
    """The settings in the files of a processor that cannot be loaded here. Raises Unreadable."""
    paths = {path for pattern in PROCESSOR_FILES for path in directory.glob(pattern)}
    try:
        files = {path.name: read_json(path) for path in paths}
    except (OSError, ValueError) as e:
        raise Unreadable(f"{directory}: the settings of its processor cannot be read: {_brief(e)}") from e
    whole = files.pop("processor_config.json", {})
    parts = {name: whole.pop(part) for part, name in PARTS.items() if isinstance(whole.get(part), dict)}
    ignored = ("processor_class", "chat_template", "auto_map")
    settings = {**files, **parts, "processor_config.json": whole}
    return {name: {k: v for k, v in said.items() if k not in ignored} for name, said in settings.items()}


def processor_template(directory: Path) -> Any:
    """The chat template of the processor in `directory`: a text, named texts, or None. Raises Unreadable."""
    from transformers.processing_utils import ProcessorMixin

    try:
        return _one(ProcessorMixin.get_processor_dict(str(directory), local_files_only=True)[0].get("chat_template"))
    except Exception as e:
        raise Unreadable(f"{directory}: its chat template cannot be read: {_brief(e)}") from e


def differences(found: Facts, wanted: Facts) -> list[str]:
    """The facts that differ, each with both values, shortened."""
    keys = [key for key in (*wanted, *(found.keys() - wanted.keys())) if found.get(key) != wanted.get(key)]
    return [f"{key}: {found.get(key)!r:.200} instead of {wanted.get(key)!r:.200}" for key in keys]


def _encoded(tokenizer: Any, text: str, special: bool) -> list[Any]:
    """The ids of a text, or the error if it has none, for example a word that is not in the vocabulary."""
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as e:  # noqa: BLE001 - from the tokenizers library, or a tokenizer's own code
        return [_brief(e)]


def _one(template: Any) -> Any:
    """The one template, if `template` maps only the name `default`; otherwise `template` itself."""
    return template["default"] if isinstance(template, Mapping) and template.keys() == {"default"} else template


def _token(token: Any) -> dict[str, Any]:
    return {key: getattr(token, key) for key in ("content", "special", "lstrip", "rstrip", "normalized", "single_word")}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.300}"
