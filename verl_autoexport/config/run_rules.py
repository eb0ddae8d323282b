"""The check, before training, that a run can export, from the run's own configuration.

Pure: it reads verl's configuration tree and imports nothing of verl. A key that is missing or
cannot be resolved is not judged; verl itself complains about the keys that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_autoexport.config.schema import AutoExportConfig, is_val, may_be_val
from verl_autoexport.errors import ConfigError

STRATEGIES, MEGATRON = ("fsdp", "fsdp2"), "megatron"
LIVE_MODES = ("sync", "colocate_async")
_SFT = "SFT's ranks are not read while they train"
_NOT_COPIED = "Megatron's weights are not copied from the running workers"
_OTHER_TRAINERS = (("async_training", "fully async"), ("rollout.nnodes", "one-step-off"))
"""A key that only this trainer's configuration has."""


@dataclass(frozen=True)
class _Run:
    cfg: DictConfig
    settings: AutoExportConfig
    last_step: int | None
    last_saved: bool = True

    @property
    def live(self) -> bool:
        """Whether weights can come from the workers, so that verl's saves do not matter."""
        return choose_source(self.cfg, self.settings)[0] == "live"

    def get(self, key: str) -> Any:
        return _get(self.cfg, key)

    @property
    def sft(self) -> bool:
        return _is_sft(self.cfg)

    @property
    def strategy_key(self) -> str:
        """The key of the strategy by which the exported role is sharded."""
        if self.sft:  # `fsdp_sft_trainer` has it in its model, the others in their engine
            return "model.strategy" if self.get("engine") is None else "engine.strategy"
        return f"{self.role_key}.strategy"

    @property
    def strategy(self) -> Any:
        """The strategy; SFT's engine of Megatron has no such key, and its class says it."""
        if self.sft and str(self.get("engine._target_")).endswith(".McoreEngineConfig"):
            return MEGATRON
        return self.get(self.strategy_key)

    @property
    def checkpoint_key(self) -> str:
        """The key of the node that says what the checkpoints of the exported role hold."""
        if self.sft:
            return "checkpoint" if self.get("checkpoint") is not None else "trainer.checkpoint"
        return f"{self.role_key}.checkpoint"

    @property
    def megatron(self) -> bool:
        return self.strategy == MEGATRON

    @property
    def megatron_key(self) -> str:
        """The key of the node with Megatron's own options."""
        return "engine" if self.sft else f"{self.role_key}.megatron"

    @property
    def role_key(self) -> str:
        return "critic" if self.settings.role == "critic" else "actor_rollout_ref.actor"

    @property
    def model_key(self) -> str:
        if self.sft:
            return "model"
        return "critic.model" if self.settings.role == "critic" else "actor_rollout_ref.model"


def choose_source(cfg: DictConfig, settings: AutoExportConfig) -> tuple[str, str]:
    """The source, `live` or `checkpoint`, and the reason: `autoexport.source=auto` resolved by this run's keys."""
    if settings.source != "auto":
        return settings.source, f"autoexport.source={settings.source}"
    if _is_sft(cfg):
        return "checkpoint", _SFT
    if (run := _Run(cfg, settings, None)).megatron:
        return "checkpoint", f"{run.strategy_key}={MEGATRON}, and {_NOT_COPIED}"
    mode = _get(cfg, "trainer.v1.trainer_mode")
    if mode is None or mode in LIVE_MODES:
        return "live", "the workers hold the weights of a step when it is logged"
    return "checkpoint", (
        f"trainer.v1.trainer_mode={mode}, and only in {', '.join(LIVE_MODES)} are the weights of a step known to be in "
        "the workers when it is logged"
    )


def check_run(cfg: DictConfig, settings: AutoExportConfig) -> list[str]:
    """Refuses a run whose own keys leave nothing to export; returns warnings, one line each.

    Raises ConfigError with one line for each problem: key, value and remedy.
    """
    if not settings.enabled:
        return []
    if _get(cfg, "trainer.val_only"):
        return ["trainer.val_only=true: this run only validates, nothing will be exported."]
    run = _Run(cfg, settings, _positive(_get(cfg, "trainer.total_training_steps")))
    _raise([line for rule in (*_RULES, *_LENGTH_RULES) for line in rule(run)])
    return list(_earlier_weights(run))


def check_length(settings: AutoExportConfig, cfg: DictConfig, last_step: int, last_saved: bool = True) -> None:
    """Makes the checks of `check_run` that need the number of the run's last step, once that is known.

    `last_saved`: verl saves at that step whatever `save_freq` is; False if the epochs end
    before `total_training_steps`.
    """
    if settings.enabled and not _get(cfg, "trainer.val_only"):
        _raise([line for rule in _LENGTH_RULES for line in rule(_Run(cfg, settings, last_step, last_saved))])


def check_trainer(cfg: DictConfig) -> None:
    """Raises ConfigError, in one line, for the configuration of a trainer whose steps are not known."""
    instead = "remove +autoexport=default and export its checkpoints with `verl-autoexport export`"
    if _get(cfg, "trainer") is None or all(_get(cfg, key) is None for key in ("actor_rollout_ref", "model")):
        raise ConfigError(
            "autoexport works in verl's PPO and SFT trainers; this configuration lacks `trainer`, or both "
            f"`actor_rollout_ref` (PPO) and `model` (SFT): {instead}."
        )
    for key, trainer in _OTHER_TRAINERS:
        if _get(cfg, key) is not None:
            raise ConfigError(
                f"{key} is in the configuration: verl's {trainer} trainer trains while it samples, and which weights "
                f"a step has is not known: {instead}."
            )


def _some_trigger(run: _Run) -> Iterator[str]:
    t = run.settings.trigger
    if not any(
        (t.every_n_steps, t.at_steps, t.every_seconds, t.on_save, t.on_train_end, t.on_request, t.best, t.threshold)
    ):
        yield (
            "autoexport.trigger: no trigger is on, nothing would ever be exported; "
            "set one, such as autoexport.trigger.on_train_end=true, or autoexport.enabled=false."
        )


def _saves(run: _Run) -> Iterator[str]:
    freq = run.get("trainer.save_freq")
    if _off(freq) and not run.live and not run.sft:  # SFT always saves its last step
        auto = run.settings.source == "auto"
        why = f" ({choose_source(run.cfg, run.settings)[1]})" if auto else ""
        yield (
            f"trainer.save_freq={freq}: exports are made of verl's checkpoints{why} and this run would write none; "
            f"set trainer.save_freq=N, N ≥ 1{'' if auto else ', or autoexport.source=auto'}."
        )
    if _off(freq) and run.live and run.settings.trigger.on_save:
        yield f"autoexport.trigger.on_save=true: trainer.save_freq={freq}, this run saves nothing; set another trigger."


def _saves_model(run: _Run) -> Iterator[str]:
    key = f"{run.checkpoint_key}.save_contents"
    contents = run.get(key)
    if contents is not None and not {"model", "hf_model"} & {*contents} and not run.live:
        yield f"{key}={_show(contents)}: checkpoints would hold no weights; add 'model'."


def _strategy(run: _Run) -> Iterator[str]:
    key, strategy = run.strategy_key, run.strategy
    if strategy is not None and strategy not in (*STRATEGIES, MEGATRON):
        yield f"{key}={strategy}: exports need one of {', '.join((*STRATEGIES, MEGATRON))} in this release."


def _saves_hf_weights(run: _Run) -> Iterator[str]:
    """Megatron's checkpoints are exported from the Hugging Face weights in them, if there are any."""
    if not run.megatron:
        return
    contents = run.get(f"{run.checkpoint_key}.save_contents") or ()
    for name, without in (("use_mbridge", False), ("use_dist_checkpointing", True)):
        key = f"{run.megatron_key}.{name}"
        if run.get(key) is without and "hf_model" not in contents:
            yield (
                f"{key}={without}: verl would save Megatron's own format, which is not read; set {key}={not without}, "
                f"or add 'hf_model' to {run.checkpoint_key}.save_contents."
            )
    key = f"{run.checkpoint_key}.async_save"
    if run.get(key):
        yield (
            f"{key}={_show(run.get(key))}: verl marks such a save as complete later, or never, so its weights are not "
            f"exported during a run; set {key}=False, or export finished checkpoints with `verl-autoexport export`."
        )


def _megatron_role(run: _Run) -> Iterator[str]:
    if not run.megatron:
        return
    if run.settings.role == "critic":
        yield f"autoexport.role=critic: value models of {run.strategy_key}={MEGATRON} are not exported; set role=actor."
    for key in (f"{run.model_key}.lora.rank", f"{run.model_key}.lora_rank"):
        if _positive(run.get(key)):
            yield (
                f"{key}={run.get(key)}: of a LoRA run with {run.strategy_key}={MEGATRON} verl saves only the adapter, "
                "which is not exported; train all weights, or set autoexport.enabled=false."
            )


def _live_mode(run: _Run) -> Iterator[str]:
    mode = run.get("trainer.v1.trainer_mode")
    if run.settings.source == "live" and run.sft:
        yield f"autoexport.source=live: {_SFT}; use autoexport.source=checkpoint."
    if run.settings.source == "live" and run.megatron:
        yield (
            f"autoexport.source=live: {run.strategy_key}={MEGATRON}, and {_NOT_COPIED}; use "
            "autoexport.source=checkpoint."
        )
    if run.settings.source == "live" and mode is not None and mode not in LIVE_MODES:
        yield (
            f"autoexport.source=live: trainer.v1.trainer_mode={mode}, but the weights of a step are known to be in the "
            f"workers when it is logged only in {', '.join(LIVE_MODES)}; use autoexport.source=checkpoint."
        )


def _trains_lora(run: _Run) -> Iterator[str]:
    key, lora = f"{run.model_key}.lora_rank", run.settings.weights.lora
    rank = run.get(key)
    if lora != "fused" and isinstance(rank, int) and rank <= 0:
        yield f"autoexport.weights.lora={lora}: this run trains no LoRA ({key}={rank}); use fused, or set {key}."


def _adapter_is_local(run: _Run) -> Iterator[str]:
    key = f"{run.model_key}.lora_adapter_path"
    path = run.get(key)
    if path and run.get(f"{run.model_key}.lora_rank") and "://" in str(path):
        yield (
            f"{key}={path}: exports need the adapter_config.json in it (alpha, rsLoRA, patterns), and a URL is not "
            "read: copy the adapter to a directory."
        )


def _has_critic(run: _Run) -> Iterator[str]:
    if run.settings.role != "critic":
        return
    if run.sft:
        yield "autoexport.role=critic: SFT trains no critic; set autoexport.role=actor."
        return
    enable, estimator = run.get("critic.enable"), run.get("algorithm.adv_estimator")
    if enable is None and estimator is not None:  # verl's own rule
        enable = estimator == "gae"
    if enable is False:
        yield (
            f"autoexport.role=critic: this run trains no critic (critic.enable={_show(run.get('critic.enable'))}, "
            f"algorithm.adv_estimator={_show(estimator)}); set autoexport.role=actor or critic.enable=True."
        )


def _validates(run: _Run) -> Iterator[str]:
    freq = run.get("trainer.test_freq")
    if _off(freq):
        for key, metric in run.settings.trigger.metrics:
            if is_val(metric):
                yield (
                    f"{key} {metric!r} needs validation and trainer.test_freq={freq}: this run never validates "
                    "weights it trained; set trainer.test_freq=N, N ≥ 1."
                )


def _at_steps_saved(run: _Run) -> Iterator[str]:
    freq, last = 1 if run.live else _positive(run.get("trainer.save_freq")), run.last_step
    if freq is None or last is None:
        return
    missed = [s for s in run.settings.trigger.at_steps if s > last or (s % freq and not (s == last and run.last_saved))]
    if missed and run.live:
        yield f"autoexport.trigger.at_steps: {missed} are beyond the last step, {last}. Choose earlier ones."
    elif missed:
        yield (
            f"autoexport.trigger.at_steps: no checkpoint at {missed}; trainer.save_freq={freq} saves at its multiples "
            f"and at the last step, {last}. Choose among those or change trainer.save_freq."
        )


def _saves_meet_validations(run: _Run) -> Iterator[str]:
    save, test = (_positive(run.get(f"trainer.{k}")) for k in ("save_freq", "test_freq"))
    if run.live:
        return
    if save is None or test is None or run.last_step is None or not (save % test and test % save):
        return
    meet = math.lcm(save, test)
    for key, metric in run.settings.trigger.metrics:
        if is_val(metric) and meet > run.last_step:
            yield (
                f"{key} {metric!r}: trainer.save_freq={save} and trainer.test_freq={test} meet first at step {meet}, "
                f"beyond the last one, {run.last_step}: only the last step could ever be chosen. "
                "Make one a multiple of the other."
            )


_RULES: tuple[Callable[[_Run], Iterator[str]], ...] = (
    _some_trigger,
    _saves,
    _saves_model,
    _strategy,
    _saves_hf_weights,
    _megatron_role,
    _live_mode,
    _trains_lora,
    _adapter_is_local,
    _has_critic,
    _validates,
)
_LENGTH_RULES = (_at_steps_saved, _saves_meet_validations)


def _earlier_weights(run: _Run) -> Iterator[str]:
    for key, metric in run.settings.trigger.metrics:
        if not may_be_val(metric):
            yield (
                f"{key} {metric!r} is measured on earlier weights: verl samples before it updates. "
                "Only metrics of the validation (val-*, in SFT val/*) measure the weights that are exported."
            )


def _is_sft(cfg: DictConfig) -> bool:
    return _get(cfg, "actor_rollout_ref") is None and _get(cfg, "model") is not None


def _get(cfg: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(cfg, key, throw_on_missing=False, throw_on_resolution_failure=False)
    except OmegaConfBaseException:  # a scalar in place of a node
        return None


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _off(freq: Any) -> bool:
    """Whether verl never does something: -1 or 0; an unknown frequency is not judged."""
    return isinstance(freq, int) and freq <= 0


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(*problems)
