"""Verified, versioned Hugging Face checkpoints from running verl training."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from verl_autoexport.errors import AutoExportError
    from verl_autoexport.export.pipeline import export_checkpoint
    from verl_autoexport.registry.record import ExportRecord
    from verl_autoexport.registry.store import Registry
    from verl_autoexport.trainers.hook import install
    from verl_autoexport.trainers.verl_callback import AutoExportCallback

__version__ = "0.1.0"
__all__ = [
    "AutoExportCallback", "AutoExportError", "ExportRecord", "Registry", "__version__", "export_checkpoint", "install",
]  # fmt: skip

# Public name -> module; resolved on first use so that importing the package stays light.
_MODULES = {
    "AutoExportCallback": "verl_autoexport.trainers.verl_callback",
    "install": "verl_autoexport.trainers.hook",
    "export_checkpoint": "verl_autoexport.export.pipeline",
    "Registry": "verl_autoexport.registry.store",
    "ExportRecord": "verl_autoexport.registry.record",
    "AutoExportError": "verl_autoexport.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
