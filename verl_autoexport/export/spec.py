"""One export as every stage reads it: the options, the place of the weights, and the triggers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_autoexport.config.reading import read_options
from verl_autoexport.config.schema import ExportOptions, VerifyConfig
from verl_autoexport.milestones.events import Trigger
from verl_autoexport.sources.formats import find_shards
from verl_autoexport.sources.protocol import ShardSource

COMMAND = "command"
"""The trigger of an export by hand."""
_STEP = re.compile(r"global_step_([0-9]+)|step_([0-9]+)-[0-9a-f]{8}")


@dataclass(frozen=True)
class ExportSpec:
    """One export: the place of the weights, the options, and the content of its record.

    `checkpoint` is the directory with the rank files (a hold, or verl's own), `origin` the path to
    record. `stall_s` is in seconds, as is `hand_over_s`, the time from a live source's copy until the
    exporter has all of it. `source` has the weights if they are not in rank files; `checkpoint` is its
    directory then. `frozen`: in-memory names of tensors that training does not change, if known;
    `grouped`: names on disk that an earlier version keeps in files of their own. `cached` False: the
    page cache belongs to training, so an export leaves nothing of its own in it.
    """

    checkpoint: Path
    step: int
    options: ExportOptions = field(default_factory=ExportOptions)
    triggers: tuple[Trigger, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    measured_on: str | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    origin: str | None = None
    stall_s: float = 0.0
    hand_over_s: float | None = None
    fingerprint: str | None = None
    source: ShardSource | None = None
    frozen: frozenset[str] | None = None
    grouped: frozenset[str] = frozenset()
    cached: bool = True

    @property
    def by_hand(self) -> bool:
        """Whether a person asked for the export and named the inputs."""
        return any(trigger.policy == COMMAND for trigger in self.triggers)

    @property
    def saved(self) -> Path:
        """The directory where verl saves the model's configuration and tokenizer."""
        return self.checkpoint / "huggingface"


def checkpoint_spec(
    checkpoint: Path, *, verify: bool = True, source: ShardSource | None = None, **options: Any
) -> ExportSpec:
    """An export by hand; the step is read from the path. Raises ConfigError or SourceError.

    `options` are fields of `ExportOptions`, `source` the shards of `checkpoint` if some are on other machines.
    """
    read = read_options(verify=VerifyConfig() if verify else VerifyConfig(load=False, generate=False), **options)
    # Absolute, since Ray's workers have another working directory.
    directory = find_shards(checkpoint.absolute()) if source is None else checkpoint
    return ExportSpec(
        checkpoint=directory if source is None else source.directory,
        step=step_of(directory),
        options=read,
        source=source,
        origin=str(directory.absolute()),
        triggers=(Trigger(COMMAND, "exported by hand"),),
    )


def step_of(directory: Path) -> int:
    """N of the nearest `global_step_N`, or of its hold, in the path; 0 if there is none."""
    for part in reversed(directory.absolute().parts):
        if found := _STEP.fullmatch(part):
            return int(found[1] or found[2])
    return 0
