"""Verified, versioned Hugging Face checkpoints from running verl training."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

# Public name -> module; resolved on first use so that importing the package stays light.
_EXPORTS = {
    "AutoExportCallback": "verl_autoexport.trainers.verl_ppo",
    "export_checkpoint": "verl_autoexport.export.pipeline",
    "Registry": "verl_autoexport.registry.store",
    "ExportRecord": "verl_autoexport.registry.record",
    "AutoExportError": "verl_autoexport.errors",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
