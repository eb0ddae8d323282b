"""Writes `configuration.md` beside this file: `make docs`.

Descriptions are the `help` of the fields in `config/schema.py`, defaults those of `configs/autoexport/default.yaml`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from verl_autoexport.config.group import config_dir
from verl_autoexport.config.schema import AutoExportConfig, parse_size, show

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Configuration

<!-- Written by `make docs` from verl_autoexport/config/schema.py and configs/autoexport/default.yaml. -->

Write each key after `autoexport.`, for example `autoexport.trigger.every_n_steps=100`. A size is a number of bytes, or
a text such as `5GB` or `512MiB`. [Triggers](triggers.md#quoting) says how to quote metrics and lists for the shell.
"""
READ_MORE = {
    "trigger": "[Triggers](triggers.md)",
    "weights": "[The base model](verification-and-base-model.md#the-base-model), [LoRA](lora.md)",
    "verify": "[Verification](verification-and-base-model.md)",
    "keep": "[Retention](retention.md)",
    "merge": "[Architecture](architecture.md)",
    "queue": "[Live weights](live.md), [Failures](failures.md)",
}
TABLE = "| Key | Default | Values | Meaning |\n|---|---|---|---|"
KINDS = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", Path: "directory"}
KINDS |= {dict: "mapping", tuple: "list"}


def page() -> str:
    group = yaml.safe_load((config_dir() / "autoexport" / "default.yaml").read_text(encoding="utf-8"))["autoexport"]
    parts = [HEAD, TABLE, *rows(AutoExportConfig, "", group)]
    for name, hint in get_type_hints(AutoExportConfig).items():
        if dataclasses.is_dataclass(hint):
            parts += [f"\n## {name}\n\n{hint.__doc__} More: {READ_MORE[name]}.\n", TABLE]
            parts += rows(hint, f"{name}.", group[name])
    return "\n".join(parts) + "\n"


def rows(cls: type, prefix: str, defaults: Mapping[str, Any] | None) -> Iterator[str]:
    """A row for each key; those of a list's entries follow it, with the defaults of the schema."""
    for field in dataclasses.fields(cls):
        hint, key = get_type_hints(cls)[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            continue
        default = field.default if defaults is None else defaults[field.name]
        text = "required" if default is dataclasses.MISSING else f"`{spelled(default)}`"
        assert field.metadata.get("help"), f"{key}: config/schema.py has no help for it"
        yield f"| `{key}` | {text} | {values(field, hint)} | {field.metadata['help']} |"
        if get_origin(hint) is tuple and dataclasses.is_dataclass(entry := get_args(hint)[0]):
            yield from rows(entry, f"{key}[].", None)


def values(field: dataclasses.Field[Any], hint: Any) -> str:
    rule, kinds = field.metadata, [get_origin(h) or h for h in (hint, *get_args(hint))]
    if rule.get("one_of"):
        return ", ".join(f"`{spelled(value)}`" for value in rule["one_of"])
    kind = "size" if rule.get("convert") is parse_size else next(KINDS[k] for k in kinds if k in KINDS)
    signs = [f"{sign} {rule[key]}" for key, sign in (("least", "≥"), ("above", ">")) if rule.get(key) is not None]
    return " ".join([kind, "of whole numbers", *signs] if kinds[:2] == [tuple, int] else [kind, *signs])


def spelled(value: Any) -> str:
    return value if isinstance(value, str) else show(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
