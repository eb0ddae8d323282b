"""A model's own code: the files that an `auto_map` refers to, and the files beside them that those import.

A reference is `module.Class`, prefixed with `repository--` if the code is in another repository
(transformers' dynamic modules). It is good if the file exists and defines the class:
`fully_shard` gives a model a class in a module of torch's, and saving its code saves that module.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
CONFIGS = (*_CONFIGS, "video_preprocessor_config.json")
"""Files with an `auto_map` that may refer to code."""


def references(auto_map: Any) -> Iterator[str]:
    """Every reference in an `auto_map`; one of a tokenizer's pair may be null."""
    if isinstance(auto_map, str):
        yield auto_map
    elif isinstance(auto_map, Mapping):
        for value in auto_map.values():
            yield from references(value)
    elif isinstance(auto_map, list | tuple):
        for value in auto_map:
            yield from references(value)


def is_good(reference: str, directory: Path) -> bool:
    """Whether the reference's file is in `directory` and defines the class."""
    module, _, name = reference.rpartition("--")[2].rpartition(".")
    path = directory / f"{module.replace('.', '/')}.py"
    try:
        return path.is_relative_to(directory) and path.is_file() and name in _defined(_parse(path))
    except (OSError, ValueError):  # not a file name
        return False


def broken(auto_map: Any, directory: Path) -> list[str]:
    """The references that lead nowhere; transformers handles those into another repository."""
    return [ref for ref in references(auto_map) if "--" not in ref and not is_good(ref, directory)]


def files(auto_maps: Iterable[Any], directory: Path) -> list[Path]:
    """The files of all good references and, recursively, of their relative imports, each once and none outside."""
    good = [ref.rpartition("--")[2] for a in auto_maps for ref in references(a) if is_good(ref, directory)]
    return closure([directory / f"{ref.rpartition('.')[0].replace('.', '/')}.py" for ref in good], directory)


def closure(paths: Iterable[Path], directory: Path) -> list[Path]:
    """The `paths` and their relative imports, below `directory`."""
    found: dict[Path, None] = {}
    waiting = list(paths)
    while waiting:
        path = waiting.pop(0)
        if path in found or not path.is_file() or not path.is_relative_to(directory):
            continue
        found[path] = None
        waiting += _imported(path)
    return list(found)


def localized(auto_map: Any, directory: Path) -> Any:
    """The `auto_map`, with local references for those into another repository whose file is in `directory`."""
    if isinstance(auto_map, str):
        own = auto_map.rpartition("--")[2]
        return own if is_good(own, directory) else auto_map
    if isinstance(auto_map, Mapping):
        return {key: localized(value, directory) for key, value in auto_map.items()}
    return [localized(value, directory) for value in auto_map] if isinstance(auto_map, list | tuple) else auto_map


def own_class(model: Any) -> type:
    """The class that the author wrote; sharding derives another one from it, in a module of torch's."""
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch."))


def save(model: Any, folder: Path) -> Mapping[str, Any] | None:
    """Writes the code of a running model's class into `folder`; returns the `auto_map` of its configuration."""
    auto_map = getattr(model.config, "auto_map", None)
    if not auto_map:
        return None
    cls, auto_map = own_class(model), {k: v for k, v in deepcopy(auto_map).items() if k is not None}
    source = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if cls.__module__ != "__main__" and source and not cls.__module__.startswith("transformers.models."):
        path = Path(source)
        for file in closure([path], path.parent):
            target = folder / file.relative_to(path.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        if auto_class := cls._auto_class:
            auto_map[auto_class] = f"{path.stem}.{cls.__name__}"
    return localized(auto_map, folder)


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return ast.Module([], [])


def _defined(module: ast.Module) -> set[str]:
    """The names that a module defines, assigns or imports at its top level."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _imported(path: Path) -> Iterator[Path]:
    """The files that `path` imports relatively: `from .a import b`, `from . import a`, `from ..c.d import e`."""
    for node in ast.walk(_parse(path)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1] if node.level <= len(path.parents) else path.parent
        parts = node.module.split(".") if node.module else []
        for names in ([*parts, alias.name] for alias in node.names):
            yield folder.joinpath(*names).with_suffix(".py")
        if parts:
            module = folder.joinpath(*parts)
            yield from (module.with_suffix(".py"), module / "__init__.py")
