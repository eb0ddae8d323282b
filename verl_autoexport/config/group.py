"""The place of the Hydra group `autoexport`."""

from __future__ import annotations

from pathlib import Path

from verl_autoexport.errors import ConfigError

_GROUP = "autoexport"


def config_dir() -> Path:
    """The directory with `autoexport/default.yaml`: in the package (wheel) or beside it (source checkout)."""
    package = Path(__file__).resolve().parents[1]
    for parent in (package, package.parent):
        if (parent / "configs" / _GROUP / "default.yaml").is_file():
            return parent / "configs"
    raise ConfigError(f"{package}/configs/{_GROUP}/default.yaml is missing: reinstall verl_autoexport.")
