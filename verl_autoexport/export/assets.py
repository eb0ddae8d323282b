"""Every file of a model directory but its weights: each kind is whole and from one side, the run's or the base model's.

The kinds are the tokenizer, the processor, the chat templates, the generation config and
the code. Files of the two sides are never mixed: transformers 5 writes fewer files than
published models have, and leftover files of the base would win on loading. Where both
sides mean the same, the base's own files are taken, since older engines can read them.
"""

from __future__ import annotations

import fnmatch
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from verl_autoexport.errors import PlanError
from verl_autoexport.model import asset_facts, custom_code, transformers4_form
from verl_autoexport.model.asset_facts import WEIGHTS, AssetLoader, Facts, Unreadable
from verl_autoexport.model.base_model import BaseModel
from verl_autoexport.model.config_json import set_values, write_base_config
from verl_autoexport.model.lora.peft_config import CONFIG_NAME
from verl_autoexport.model.skeleton import Skeleton
from verl_autoexport.model.transformers_api import set_dtype
from verl_autoexport.system.untrusted import read_json

_TEMPLATE = ("chat_template*", "additional_chat_templates/*")
_CODE = ("*.py",)
_PROCESSOR = ("*processor_config.json", "*processor*_config.json", "audio_tokenizer_config.json")
_TOKENIZER = (
    "tokenizer*", "vocab*", "*.vocab", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.spm",
    "*.tiktoken", "*.bpe", "bpe.codes", "tekken.json", "normalizer.json", "dict.txt",
)  # fmt: skip
_GENERATION = "generation_config.json"
_KINDS = (_CODE, _TEMPLATE, _PROCESSOR, (_GENERATION,), _TOKENIZER)  # the first that matches a name is its kind
_TOKENS = ("bos", "eos", "pad")
_SAYS_NOTHING = ("transformers_version", "_from_model_config")
"""Keys of a generation config that change nothing."""
_WITHOUT_CODE = AssetLoader()


@dataclass(frozen=True)
class Reference:
    """The directories that the written tokenizer and processor must equal; None if there is nothing to compare.

    The processor's chat template comes from `processor_template`; if that is None, from the tokenizer.
    """

    tokenizer: Path | None = None
    processor: Path | None = None
    processor_template: Path | None = None

    def to_json(self) -> dict[str, str | None]:
        """The arguments of the load check."""
        return {key: value and str(value.absolute()) for key, value in vars(self).items()}


def write_config(
    skeleton: Skeleton,
    dtype: str | None,
    target: Path,
    base: BaseModel | None = None,
    values: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """`config.json` for the model in `dtype` (torch's name without `torch.`); returns notes.

    With a `base`, the file is the base's own with the changed keys; otherwise `save_pretrained`'s.
    With `dtype` None, each tensor keeps the base's dtype, and so does the file. `values`, by
    dotted key, replace the trained model's.
    """
    config, named = skeleton.config, dtype or (base and base.usual_dtype)
    if named is None:
        raise PlanError(f"{target}: config.json would name the dtype of the base model, but no base model is given.")
    set_values(config, values)
    set_dtype(config, named)  # nested configs were set when the skeleton was built
    config.architectures = [skeleton.name]
    config.save_pretrained(target)
    if base is None:
        return []
    key = write_base_config(skeleton, dtype, base, target)
    style = "config.json is written as this transformers writes it, not as the base model's file"
    return [f"{style}: the base's file cannot express {key} as trained"] if key else []


def model_files(module: Any, tokenizer: Any) -> dict[str, bytes]:
    """The files that verl saves beside a checkpoint's shards, by path: config, code, tokenizer or processor, adapter.

    As in `fsdp_checkpoint_manager.py` (verl 0.9.1), the generation config is made from the base
    model's; but the code is that of the sharded class, and `module` stays unchanged.
    """
    from copy import deepcopy

    from transformers import GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / "huggingface"
        beside.mkdir()
        config = deepcopy(module.config)
        model = module.get_base_model() if hasattr(module, "get_base_model") else module
        if (auto_map := custom_code.save(model, beside)) is not None:
            config.auto_map = auto_map
        config.save_pretrained(beside)
        if module.can_generate() and config.name_or_path:
            with suppress(Exception):  # missing, or refused by transformers: the base's file is used
                GenerationConfig.from_pretrained(config.name_or_path).save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if adapter := (getattr(module, "peft_config", None) or {}).get("default"):
            adapter.save_pretrained(folder)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def write_assets(
    run: Path, base: Path | None, target: Path, loader: AssetLoader = _WITHOUT_CODE, *, generates: bool = True
) -> tuple[list[str], Reference]:
    """Writes everything but weights and `config.json` into `target`, from the run's saved files and the base's.

    `config.json` must already be there. Returns notes, and the reference that the result must equal.
    """
    work = _Work(run, base, target, loader)
    _copy(run, target, work.own(None))
    notes = [*work.write_code(), *work.write_tokenizer(), *work.write_processor(), *work.add_code()]
    work.write_templates()
    if generates:
        notes += work.write_generation_config()
    notes += [*work.align_tokens(), *work.check_generation_config()]
    return notes, work.reference()


class _Work:
    """The files of one export. `run` may be untrusted, so symbolic links in it are left out."""

    def __init__(self, run: Path, base: Path | None, target: Path, loader: AssetLoader) -> None:
        self.run, self.base, self.target, self.loader = run, base, target, loader
        self.tokenizer: Path | None = None
        self.processor: Path | None = None
        self.processor_template: Path | None = None

    def own(self, kind: tuple[str, ...] | None) -> list[Path]:
        """The run's files of a kind, as paths relative to `run`; `kind` None selects the files without a kind."""
        paths = (p for p in sorted(self.run.rglob("*")) if p.is_file() and not p.is_symlink())
        return [p for p in (p.relative_to(self.run) for p in paths) if not _is_ours(p) and _kind(p) == kind]

    def theirs(self, kind: tuple[str, ...]) -> list[Path]:
        """The base's files of a kind, as relative paths; in the hub's cache they are links."""
        if self.base is None:
            return []
        folders = (self.base, self.base / "additional_chat_templates")
        paths = (p for folder in folders if folder.is_dir() for p in sorted(folder.iterdir()) if p.is_file())
        return [p for p in (p.relative_to(self.base) for p in paths) if _kind(p) == kind]

    def base_with(self, has: Callable[[Path], bool]) -> Path | None:
        """The base's directory, if it passes the test `has`."""
        return self.base if self.base is not None and has(self.base) else None

    def facts(self, directory: Path | None) -> Facts | None:
        """The facts of the tokenizer in `directory`; None if there is no tokenizer, or it cannot be loaded."""
        if directory is None or not asset_facts.has_tokenizer(directory):
            return None
        with suppress(Unreadable):
            return self.loader.tokenizer_facts(directory)
        return None

    def write_code(self) -> list[str]:
        """The run's code if it is complete, else the base's; only the run's files that an `auto_map` needs."""
        wanted = _auto_maps(self.target, self.run)
        if not any(True for m in wanted for _ in custom_code.references(m)):
            return []
        own = [p.relative_to(self.run) for p in custom_code.files(wanted, self.run) if not p.is_symlink()]
        if self.base is None or (own and not any(custom_code.broken(m, self.run) for m in wanted)):
            _copy(self.run, self.target, own)
            return []
        needed = custom_code.files([*wanted, *_auto_maps(self.base)], self.base)
        needed = [*self.theirs(_CODE), *(p.relative_to(self.base) for p in needed)]
        _copy(self.base, self.target, needed)
        _copy(self.run, self.target, [p for p in own if p not in needed])  # such as another model's tokenizer code
        return ["code: the base model's; the run saved no complete code"]

    def add_code(self) -> list[str]:
        """Adds the code of a tokenizer or processor that came from the base."""
        if self.base is None:
            return []
        lost = [m for m in _auto_maps(self.target) if custom_code.broken(m, self.target)]
        needed = [p.relative_to(self.base) for p in custom_code.files(lost, self.base)]
        needed = [p for p in needed if not (self.target / p).exists()]
        _copy(self.base, self.target, needed)
        return [f"code of the base model's own: {', '.join(map(str, needed))}"] if needed else []

    def write_tokenizer(self) -> list[str]:
        base = self.base_with(asset_facts.has_tokenizer)
        if not asset_facts.has_tokenizer(self.run):
            if base is None:
                return ["no tokenizer: the run saved none, so this version has none; add the base model's to serve it"]
            self.tokenizer = base
            _copy(base, self.target, self.theirs(_TOKENIZER))
            return ["tokenizer: the base model's; the run saved none"]
        self.tokenizer = self.run
        facts = self.facts(self.run)
        if base is not None and facts is not None and _same(facts, self.facts(base)):
            _copy(base, self.target, self.theirs(_TOKENIZER))
            if _same(facts, self.facts(self.target)):  # beside an adapter no config.json names its class
                return []
            for path in self.theirs(_TOKENIZER):
                (self.target / path).unlink()
        _copy(self.run, self.target, self.own(_TOKENIZER))
        if facts is None:
            return []
        with transformers4_form.tried(self.target, ("tokenizer_config.json",)) as keep:
            transformers4_form.write_tokenizer(self.target, base, facts)
            keep(_same(facts, self.facts(self.target)))
        return []

    def write_processor(self) -> list[str]:
        base = self.base_with(asset_facts.has_processor)
        if not asset_facts.has_processor(self.run):
            if base is None:
                return []
            self.processor = base
            _copy(base, self.target, self.theirs(_PROCESSOR))
            return ["processor: the base model's; the run saved none"]
        self.processor = self.run
        with suppress(Unreadable):
            facts = self.loader.processor_facts(self.run)
            if base is not None and facts == self.loader.processor_facts(base):
                _copy(base, self.target, self.theirs(_PROCESSOR))
                return []
        _copy(self.run, self.target, self.own(_PROCESSOR))
        transformers4_form.write_processor(self.target)
        return []

    def write_templates(self) -> None:
        """The run's templates, in the base's file layout and as `chat_template.jinja`."""
        run, base = self.facts(self.run), self.facts(self.base)
        if run is None:  # no loadable tokenizer: the files are copied unchanged
            own = self.own(_TEMPLATE)
            side = self.run if own or self.tokenizer == self.run else self.base
            if side is not None:
                _copy(side, self.target, own if side == self.run else self.theirs(_TEMPLATE))
            self.processor_template = side if self.processor is not None else None
            return
        wanted, unchanged = run["chat template"], base is not None and run["chat template"] == base["chat template"]
        legacy = any(p.name == transformers4_form.LEGACY_TEMPLATE for p in self.theirs(_TEMPLATE))
        if self.base is not None and unchanged:
            files = [
                p for p in self.theirs(_TEMPLATE) if self.processor or p.name != transformers4_form.LEGACY_TEMPLATE
            ]
            _copy(self.base, self.target, files)
        transformers4_form.set_template(self.target, wanted, self.base, unchanged)
        if self.processor is None:
            return
        shown = wanted
        if self.processor == self.run or unchanged:
            with suppress(Unreadable):
                its = asset_facts.processor_template(self.processor)
                if its is not None or not (self.target / transformers4_form.TEMPLATE).exists():
                    self.processor_template, shown = self.processor, its
        transformers4_form.set_processor_template(self.target, shown, legacy or shown != wanted)

    def write_generation_config(self) -> list[str]:
        own, theirs = self.run / _GENERATION, self.base / _GENERATION if self.base else None
        has_own = own.is_file() and not own.is_symlink()
        if theirs is not None and theirs.is_file() and (not has_own or _settings(own) == _settings(theirs)):
            shutil.copyfile(theirs, self.target / _GENERATION)
            return [] if has_own else ["generation config: the base model's; the run saved none"]
        if not has_own:
            return ["no generation config: the run saved none; engines use their defaults"]
        shutil.copyfile(own, self.target / _GENERATION)
        return []

    def check_generation_config(self) -> list[str]:
        """Notes the settings of a run or a base that transformers refuses here; other readers may refuse them too."""
        from transformers import GenerationConfig

        try:
            if (self.target / _GENERATION).is_file():
                GenerationConfig.from_pretrained(self.target)
        except Exception as e:  # noqa: BLE001 - whatever its checks raise is the note
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            return [f"{_GENERATION}: copied as it was, but transformers refuses it: {reason:.300}"]
        return []

    def align_tokens(self) -> list[str]:
        """Replaces the base's end, begin and padding tokens in config and generation config by the run's.

        Otherwise a model that learned to end with the run's token would never stop. As in transformers'
        own Trainer, generation ends at the tokenizer's token and at the earlier ones.
        """
        run = self.facts(self.run)
        if run is None:
            return []
        base = (self.facts(self.base) or {}).get("special ids", {})
        ids = {f"{k}_token_id": v for k in _TOKENS if (v := run["special ids"].get(f"{k}_token")) is not None}
        changed = {k: v for k, v in ids.items() if base.get(k.removesuffix("_id")) != v} if self.base else {}
        notes = [_edit(self.target / "config.json", changed)] if changed else []
        if not self.base or "eos_token_id" in changed:  # without a base the change is unknown
            changed["eos_token_id"] = ids.get("eos_token_id")
        notes.append(_edit(self.target / _GENERATION, {k: v for k, v in changed.items() if v is not None}, add=True))
        return [note for note in notes if note]

    def reference(self) -> Reference:
        return Reference(self.tokenizer, self.processor, self.processor_template)


def _is_ours(path: Path) -> bool:
    """Whether the export writes the file itself, or the file has no use."""
    return path.name.endswith(WEIGHTS) or path in (Path("config.json"), Path(CONFIG_NAME)) or path.parts[0] == ".cache"


def _kind(path: Path) -> tuple[str, ...] | None:
    name = path.as_posix() if path.parts[0] == "additional_chat_templates" else path.name
    if len(path.parts) > 1 and name == path.name and path.suffix != ".py":
        return None  # a folder of the run's own, for example of a second tokenizer
    return next((kind for kind in _KINDS if any(fnmatch.fnmatch(name, pattern) for pattern in kind)), None)


def _copy(source: Path, target: Path, files: Iterable[Path]) -> None:
    for relative in files:
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)


def _same(a: Facts, b: Facts | None) -> bool:
    """Whether two tokenizers are equal except for their chat templates."""
    return b is not None and {**a, "chat template": 0} == {**b, "chat template": 0}


def _auto_maps(*directories: Path) -> list[Any]:
    found = []
    for path in (directory / name for directory in directories for name in custom_code.CONFIGS):
        with suppress(OSError, ValueError):
            found.append(read_json(path).get("auto_map") or {})
    return found


def _settings(path: Path) -> Mapping[str, Any]:
    """A generation config without defaults, as transformers reads it; the plain content if transformers cannot."""
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_dict(read_json(path)).to_diff_dict()
    except Exception:  # noqa: BLE001 - whatever its checks raise: then the two files are compared as they are
        with suppress(ValueError):
            return read_json(path)
        return {"unreadable": path.read_bytes()}
    return {key: value for key, value in settings.items() if key not in _SAYS_NOTHING}


def _edit(path: Path, ids: Mapping[str, int], add: bool = False) -> str:
    """Replaces token ids in a file; returns a note of the changes. `add`: `eos_token_id` also keeps its old ids."""
    try:
        data = read_json(path)
    except (OSError, ValueError):
        return ""
    said = []
    for node in (n for n in (data, data.get("text_config")) if isinstance(n, dict)):
        for key, value in ids.items():
            before = node.get(key)
            known = before if isinstance(before, list) else [] if before is None else [before]
            if value in known or (node is not data and key not in node):
                continue
            keeps = add and key == "eos_token_id" and known
            node[key] = [value, *known] if keeps else value
            said.append(f"{key} {node[key]} for {before}")
    if said:
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"{path.name}: {', '.join(dict.fromkeys(said))}, as the run's tokenizer has it" if said else ""
