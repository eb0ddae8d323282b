"""Every error this package raises on purpose.

A message names the thing (path, step, rank, tensor, key), what was expected, what was
found and what to do about it.

    AutoExportError
    ├── ConfigError      the `autoexport` node, or the run around it, cannot work
    ├── SourceError      the shards are missing, damaged, changed or contradict each other
    ├── PlanError        the shards are whole but make no complete model
    ├── MergeError       bytes could not be read, cast or written
    ├── VerifyError      the merged directory is not the model it should be
    └── RegistryError    the output directory cannot take, or does not have, a version
        └── RegistryBusy another process is changing it; later it can
"""

from __future__ import annotations

_LONGEST = 4000  # characters of a message


class AutoExportError(Exception):
    """Base of all errors of this package; catch it to catch them all."""


class _OneLine(AutoExportError):
    """Quotes names from files that nobody vouches for: they can neither break the line nor flood the log."""

    def __str__(self) -> str:
        text = super().__str__()
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class ConfigError(AutoExportError):
    """A configuration key, or a combination with the run's own keys, that cannot work."""


class SourceError(_OneLine):
    """Shards that are missing, truncated, rewritten meanwhile, or inconsistent over ranks."""


class PlanError(_OneLine):
    """A set of tensors that is not the complete model its `config.json` names."""


class MergeError(_OneLine):
    """A tensor that could not be read, cast or written."""


class VerifyError(_OneLine):
    """A merged directory that failed verification; it is never published."""


class RegistryError(_OneLine):
    """An output directory, or a version in it, that is not as it must be."""


class RegistryBusy(RegistryError):
    """An output directory whose lock another process holds; the same call may succeed later."""
