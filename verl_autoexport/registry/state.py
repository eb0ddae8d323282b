"""`registry.json`: the changeable facts about published versions, and how to rebuild them after a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from verl_autoexport.errors import RegistryError
from verl_autoexport.registry import journal
from verl_autoexport.registry.pointers import POINTER
from verl_autoexport.registry.retention import Keep, from_dict
from verl_autoexport.registry.versions import NAME
from verl_autoexport.system.durable_files import write_json_atomic
from verl_autoexport.system.untrusted import is_count, read_json

FILE = "registry.json"
SCHEMA_VERSION = 1
_LARGEST = 10**18


@dataclass
class State:
    """`superseded` maps a directory name to the step resumed at, and the time.

    `removed`: no longer versions, though their directories could not be moved away yet.
    """

    next_version: int = 1
    superseded: dict[str, dict[str, Any]] = field(default_factory=dict)
    pins: list[str] = field(default_factory=list)
    pointers: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)

    def write(self, root: Path) -> None:
        write_json_atomic(root / FILE, {"schema_version": SCHEMA_VERSION, **asdict(self)})


def load(root: Path, facts: Callable[[], Facts] | None = None) -> tuple[State, str | None]:
    """The state in `registry.json`; if that is lost or damaged, the journal's state, and the reason for using it.

    `facts` returns the journal's facts, for a caller who has read them.
    """
    path = root / FILE
    try:
        return _parse(path), None
    except FileNotFoundError:
        problem = f"{path}: missing"
    except ValueError as e:
        problem = f"{path}: unreadable: {e}"
    except OSError as e:
        raise RegistryError(f"{path}: cannot be read: {e}") from e
    return (facts() if facts else Facts(journal.read(root / journal.NAME)[0])).state(), problem


class Facts:
    """The sum of journal entries, added one after the other. Names keep their order in `pins` and `removed`.

    `gone`: all names ever noted as removed. `failures`: path -> the last noted reason why it could not be deleted.
    """

    def __init__(self, entries: Iterable[dict[str, Any]] = ()) -> None:
        self.next_version = 1
        self.superseded: dict[str, dict[str, Any]] = {}
        self.pins: dict[str, None] = {}
        self.removed: dict[str, None] = {}
        self.published: set[str] = set()
        self.gone: set[str] = set()
        self.failures: dict[str, Any] = {}
        self.keep: Keep | None = None
        for entry in entries:
            self.take(entry)

    def take(self, entry: dict[str, Any]) -> None:
        event, name = entry["event"], entry.get("version")
        if event == "superseded":
            _supersede(self.superseded, entry)
        elif event == "keep":
            with suppress(ValueError):
                self.keep = from_dict(entry)
        elif event == "delete_failed" and isinstance(path := entry.get("path"), str):
            self.failures[path] = entry.get("reason")
        elif is_name(name) and event in ("published", "removed"):
            self.next_version = max(self.next_version, number_of(name) + 1)
            if event == "published":
                self.published.add(name)
            else:
                self.gone.add(name)
                self.removed.setdefault(name)
        elif is_name(name) and event in ("deleted", "unpinned"):
            (self.removed if event == "deleted" else self.pins).pop(name, None)
        elif is_name(name) and event == "pinned":
            self.pins.setdefault(name)

    def state(self) -> State:
        """Everything but the pointers, which follow from the versions."""
        superseded = {name: dict(mark) for name, mark in self.superseded.items()}
        return State(self.next_version, superseded, list(self.pins), removed=list(self.removed))


def supersede(state: State, entry: dict[str, Any]) -> None:
    """Applies a `superseded` journal entry; versions superseded earlier stay unchanged."""
    _supersede(state.superseded, entry)


def _supersede(superseded: dict[str, dict[str, Any]], entry: dict[str, Any]) -> None:
    names, resumed_at = entry.get("versions"), entry.get("resumed_at")
    if not isinstance(names, list) or not is_count(resumed_at):
        return
    for name in filter(is_name, names):
        superseded.setdefault(name, {"resumed_at": resumed_at, "at": entry.get("at")})


def number_of(name: str) -> int:
    return int(name[1 : name.index("-")])


def is_name(name: object) -> TypeGuard[str]:
    """Whether `name` is the name of a version's directory."""
    return isinstance(name, str) and len(name) < 256 and NAME.fullmatch(name) is not None


def _parse(path: Path) -> State:
    data = read_json(path)
    schema = data.get("schema_version")
    if is_count(schema) and schema > SCHEMA_VERSION:
        # Not damage: rebuilding would discard the data of a newer program.
        raise RegistryError(f"{path}: schema_version {schema} is newer than {SCHEMA_VERSION}: upgrade verl_autoexport")
    next_version, superseded = data.get("next_version"), data.get("superseded")
    pointers = data.get("pointers")
    if schema != SCHEMA_VERSION or not is_count(next_version) or next_version > _LARGEST:
        raise ValueError(f"schema_version {schema!r} or next_version {next_version!r} is not valid")
    if not isinstance(superseded, dict) or not all(map(is_name, superseded)):
        raise ValueError("superseded: expected an object keyed by version directories")
    if not all(isinstance(mark, dict) and is_count(mark.get("resumed_at")) for mark in superseded.values()):
        raise ValueError("superseded: expected objects with resumed_at")
    pins, removed = _names("pins", data.get("pins")), _names("removed", data.get("removed", []))
    if not isinstance(pointers, dict) or not all(POINTER.fullmatch(k) and is_name(v) for k, v in pointers.items()):
        raise ValueError("pointers: expected an object from latest, best… to version directories")
    return State(next_version, superseded, pins, pointers, removed)


def _names(key: str, value: object) -> list[str]:
    if not isinstance(value, list) or not all(map(is_name, value)):
        raise ValueError(f"{key}: expected a list of version directories")
    return value
