"""What one export is to do: the data that every stage reads."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_autoexport.config.schema import VerifyConfig, parse_size
from verl_autoexport.errors import ConfigError
from verl_autoexport.milestones.events import Trigger
from verl_autoexport.shards.manifest import ShardSource
from verl_autoexport.sources.fsdp.discovery import find_checkpoint

COMMAND = "command"
"""The trigger of an export by hand."""
_STEP = re.compile(r"global_step_([0-9]+)|step_([0-9]+)-[0-9a-f]{8}")


@dataclass(frozen=True)
class ExportSpec:
    """One export: what to read, how to write it, and what to say of it.

    `checkpoint` is the directory with the rank files (a pin, or verl's own), `origin` the
    path to record. `memory_budget` and `max_shard_size` are bytes, `stall_s` and `hand_over_s`
    (of a live source: from the copy until all of it was with the exporter) seconds.
    `lora_config`: the `adapter_config.json` that a LoRA run began with, or its directory.
    `source`: where the weights are if not in rank files; `checkpoint` is its directory then.
    `frozen`: in-memory names of tensors that training does not change, where that is known; `grouped`:
    names on disk that an earlier version keeps in files of their own. `cached` False: the page cache is
    training's, and is left without what an export reads and writes. `base_check`: `strict` refuses what
    differs from the base model, `warn` notes it, `off` does not compare. `carry_unread`: tensors of
    the base that training never read are copied.
    """

    checkpoint: Path
    step: int
    dtype: str = "bfloat16"
    max_shard_size: int = 5 * 10**9
    memory_budget: int = 1 << 30
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    trust_remote_code: bool = False
    external_lib: str | None = None
    triggers: tuple[Trigger, ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    measured_on: str | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    origin: str | None = None
    stall_s: float = 0.0
    hand_over_s: float | None = None
    fingerprint: str | None = None
    lora: str = "fused"
    lora_config: Path | None = None
    source: ShardSource | None = None
    frozen: frozenset[str] | None = None
    grouped: frozenset[str] = frozenset()
    cached: bool = True
    saved: Path | None = None
    base_check: str = "strict"
    carry_unread: bool = False

    @property
    def by_hand(self) -> bool:
        """Whether a person asked for it, and named what it needs."""
        return any(trigger.policy == COMMAND for trigger in self.triggers)

    @property
    def model_dir(self) -> Path:
        """Where the model's config and tokenizer are: `saved`, or where verl saves them."""
        return self.saved or self.checkpoint / "huggingface"


def checkpoint_spec(
    checkpoint: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_size: int | str = "5GB",
    base_model: str | None = None,
    lora: str = "fused",
    memory_budget: int | str = "1GiB",
    verify: bool = True,
    trust_remote_code: bool = False,
    lora_config: str | os.PathLike[str] | None = None,
    source: ShardSource | None = None,
    base_check: str = "strict",
    carry_unread: bool = False,
) -> ExportSpec:
    """The spec of an export by hand; the step is read from the path. Raises ConfigError or SourceError.

    `source`: the shards of `checkpoint` where they are not all on this machine.
    """
    if dtype not in ("bfloat16", "float16", "float32", "source", "base"):
        raise ConfigError(f"dtype {dtype!r}: expected bfloat16, float16, float32, source or base.")
    if lora not in ("fused", "adapter", "both"):
        raise ConfigError(f"lora {lora!r}: expected fused, adapter or both.")
    if base_check not in ("strict", "warn", "off"):
        raise ConfigError(f"base_check {base_check!r}: expected strict, warn or off.")
    # Ray's workers have another working directory
    directory = find_checkpoint(checkpoint.absolute()) if source is None else checkpoint
    return ExportSpec(
        checkpoint=directory if source is None else source.directory,
        step=step_of(directory),
        source=source,
        dtype=dtype,
        max_shard_size=parse_size(max_shard_size, "max_shard_size"),
        memory_budget=parse_size(memory_budget, "memory_budget"),
        verify=VerifyConfig() if verify else VerifyConfig(load=False, generate=False),
        trust_remote_code=trust_remote_code,
        base_model=base_model,
        lora=lora,
        base_check=base_check,
        carry_unread=carry_unread,
        lora_config=None if lora_config is None else Path(lora_config),
        origin=str(directory.absolute()),
        triggers=(Trigger(COMMAND, "exported by hand"),),
    )


def step_of(directory: Path) -> int:
    """N of the nearest `global_step_N`, or of a pin of it, in the path; 0 where there is none."""
    for part in reversed(directory.absolute().parts):
        if found := _STEP.fullmatch(part):
            return int(found[1] or found[2])
    return 0
