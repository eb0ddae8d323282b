"""Every error this package raises on purpose.

A message names the thing (path, step, rank, tensor, key), the expected value, the one
found and the remedy.

    AutoExportError
    ├── ConfigError      the `autoexport` node, or the run around it, cannot work
    ├── SourceError      the shards are missing, damaged, changed or contradictory
    │   └── SourceBusy   a worker still hands over the previous snapshot; a later call can succeed
    ├── PlanError        the shards are whole but make no complete model
    ├── MergeError       a tensor could not be read, cast or written
    ├── VerifyError      the merged directory is not the model it should be
    ├── PublishError     a publisher did not deliver a version
    └── RegistryError    the output directory cannot take, or does not have, a version
        └── RegistryBusy another process is changing the directory; a later call can succeed
"""

from __future__ import annotations

_LONGEST = 4000  # characters of a line


class AutoExportError(Exception):
    """Base of all errors of this package; catch it to catch them all. Each argument is one line of the message.

    Names in a message may come from untrusted files; they can neither break the line nor flood the log.
    """

    def __str__(self) -> str:
        lines = (
            arg if len(arg) <= _LONGEST else f"{arg[:_LONGEST]}… ({len(arg)} characters)" for arg in map(str, self.args)
        )
        return "\n".join(map(shown, lines))


class ConfigError(AutoExportError):
    """A configuration key, or a combination with the run's own keys, that cannot work."""


class SourceError(AutoExportError):
    """Shards that are missing, truncated, rewritten during the read, or inconsistent across ranks."""


class SourceBusy(SourceError):
    """A worker that still hands over its part of the previous snapshot; the same call may succeed later."""


class PlanError(AutoExportError):
    """A set of tensors that does not form the complete model in `config.json`."""


class MergeError(AutoExportError):
    """A tensor that could not be read, cast or written."""


class VerifyError(AutoExportError):
    """A merged directory that failed verification; it is never published."""


class PublishError(AutoExportError):
    """A published version that a publisher could not deliver; the version itself stays as it is."""


class RegistryError(AutoExportError):
    """An output directory, or a version in it, that is not in the required state."""


class RegistryBusy(RegistryError):
    """An output directory whose lock another process holds; the same call may succeed later."""


def shown(text: object) -> str:
    """`text` for a person to read: characters that move the cursor, colour, reorder or break the line are escaped."""
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
