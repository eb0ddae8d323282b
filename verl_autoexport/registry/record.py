"""`export.json`: the record of a published version, written once."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from verl_autoexport.errors import RegistryError
from verl_autoexport.milestones.events import is_measured, is_trigger
from verl_autoexport.system.untrusted import read_json

RECORD = "export.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ExportRecord:
    """The content of `export.json`; field by field the contract of a published version.

    `timings_s` are seconds per stage, `files` lists name, bytes and sha256 of every file
    but `export.json` itself, `verification` maps each check to its status and detail.
    `version` is 0 for an export outside a registry.
    """

    version: int
    step: int
    created_at: str
    run: Mapping[str, Any]
    triggers: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, float | None]
    measured_on: str | None
    source: Mapping[str, Any]
    base_model: str | None
    architectures: tuple[str, ...]
    dtype: str
    num_parameters: int
    files: tuple[Mapping[str, Any], ...]
    verification: Mapping[str, Mapping[str, Any]]
    timings_s: Mapping[str, float]
    versions: Mapping[str, str | None]
    notes: tuple[str, ...] = ()
    schema_version: int = field(default=1)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExportRecord:
        """The record in `data`; raises KeyError for a missing field, TypeError for one of a wrong type."""
        _check_types(data)
        known = {f.name for f in dataclasses.fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        for key in ("triggers", "architectures", "files", "notes"):
            values[key] = tuple(values.get(key, ()))
        return cls(**values)


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "schema_version": int, "version": int, "step": int, "created_at": str, "run": Mapping, "triggers": (list, tuple),
    "metrics": Mapping, "source": Mapping, "architectures": (list, tuple), "dtype": str, "num_parameters": int,
    "files": (list, tuple), "verification": Mapping, "timings_s": Mapping, "versions": Mapping,
}  # fmt: skip


def _check_types(data: Mapping[str, Any]) -> None:
    for key, kind in _FIELD_TYPES.items():
        if not isinstance(data[key], kind) or (kind is int and isinstance(data[key], bool)):
            raise TypeError(f"{key}: expected {kind}, found {type(data[key]).__name__}")
    for key, (expected, holds) in _INNER.items():
        found = data.get(key) or ()
        items = found.values() if isinstance(found, Mapping) else found
        if not (holds is _is_number and _are_numbers(items)) and not all(map(holds, items)):
            wrong = next(item for item in items if not holds(item))
            raise TypeError(f"{key}: expected {expected}, found {wrong!r:.80}")
    for key, value in (("source", data["source"].get("fingerprint")), *((k, data.get(k)) for k in _TEXTS)):
        if not isinstance(value, str | None):
            raise TypeError(f"{key}: expected a text or null, found {value!r:.80}")


def read_record(path: Path | str) -> ExportRecord:
    """The record in `path`, an `export.json` or the directory with one; RegistryError names the fault."""
    path = Path(path)
    return read_record_file(path / RECORD if path.is_dir() else path)


def read_record_file(path: Path) -> ExportRecord:
    """The record in the file `path`; raises RegistryError, as `read_record` does."""
    try:
        data = read_json(path)
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema_version {data.get('schema_version')!r}, expected {SCHEMA_VERSION}")
        record = ExportRecord.from_dict(data)
        _check(record)
    except FileNotFoundError:
        raise RegistryError(f"{path}: missing, so this is not a published export") from None
    except KeyError as e:
        raise RegistryError(f"{path}: not a valid export record: {e} is missing") from e
    except (ValueError, TypeError) as e:
        raise RegistryError(f"{path}: not a valid export record: {e}") from e
    except OSError as e:
        raise RegistryError(f"{path}: cannot be read: {e}") from e
    return record


def created_at(record: ExportRecord) -> float:
    """Unix time of `record.created_at`; ValueError if it is no ISO 8601 time."""
    # Before Python 3.11 fromisoformat rejects "Z".
    time = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", record.created_at))
    return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()


def _check(record: ExportRecord) -> None:
    if record.version < 0 or record.step < 0:
        raise ValueError(f"version {record.version} and step {record.step} cannot be negative")
    try:
        created_at(record)
    except (ValueError, OverflowError) as e:
        raise ValueError(f"created_at: expected an ISO 8601 time: {e}") from None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return value is None or is_measured(value)


def _are_numbers(values: Collection[Any]) -> bool:
    """Whether all are plain finite numbers, as most are; a registry may have a million of them."""
    try:
        return {*map(type, values)} <= {float, int} and all(map(math.isfinite, values))
    except OverflowError:  # an integer too large for a float
        return False


def _is_file(value: Any) -> bool:
    size = value.get("bytes", 0) if isinstance(value, Mapping) else None
    whole = isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 63
    return whole and all(isinstance(value.get(key, ""), str) for key in ("name", "sha256"))


def _is_check(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("status"), str):
        return False
    lists = (value.get("transposed", ()), value.get("carried", ()))
    return all(isinstance(names, (list, tuple)) and all(map(_is_text, names)) for names in lists)


_TEXTS = ("measured_on", "base_model")
_INNER: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "triggers": ("objects with a policy", is_trigger),
    "metrics": ("finite numbers or null", _is_number),
    "architectures": ("texts", _is_text),
    "files": ("objects with name, bytes and sha256", _is_file),
    "verification": ("objects with a status", _is_check),
    "timings_s": ("finite numbers", is_measured),
    "versions": ("texts or null", lambda value: isinstance(value, str | None)),
    "notes": ("texts", _is_text),
}
