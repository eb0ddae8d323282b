"""Versions of the packages that decide what an export writes."""

from __future__ import annotations

from importlib import metadata

from verl_autoexport import __version__

_PACKAGES = ("torch", "transformers")


def versions(*more: str) -> dict[str, str | None]:
    """Name -> version of this package, torch, transformers and `more`; None for a package that is not installed."""
    return {"verl_autoexport": __version__} | {name: _installed(name) for name in (*more, *_PACKAGES)}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
