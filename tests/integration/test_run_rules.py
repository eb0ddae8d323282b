"""The checks of the run around the `autoexport` node, in verl's own configuration as its main composes it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from verl_autoexport.config.reading import load_config
from verl_autoexport.config.run_rules import check_length, check_run, check_trainer, choose_source
from verl_autoexport.errors import ConfigError
from verl_autoexport.trainers.hook import watch_modules

VERL_CONFIGS = Path(importlib.util.find_spec("verl").submodule_search_locations[0]) / "trainer" / "config"


@pytest.fixture(scope="module")
def verl_config():
    """verl's own configuration with our group, composed as its main composes it."""
    with initialize_config_dir(str(VERL_CONFIGS), version_base=None):
        watch_modules()  # without the hook the configuration cannot be resolved
        yield lambda *overrides: compose("ppo_trainer", ["+autoexport=default", "trainer.save_freq=2", *overrides])


def judge(cfg) -> list[str]:
    return check_run(cfg, load_config(cfg.autoexport))


def megatron(*overrides: str) -> DictConfig:
    """verl's own configuration of a Megatron run."""
    return compose("ppo_megatron_trainer", ["+autoexport=default", "trainer.save_freq=2", *overrides])


def best(metric: str) -> str:
    return f"autoexport.trigger.best={{metric:{metric},mode:max}}"


GRPO = "algorithm.adv_estimator=grpo"
MODEL = "actor_rollout_ref.model"
VAL = best("val-core/*/acc/mean@1")
LIVE, SAVED = "autoexport.source=live", "autoexport.source=checkpoint"
ASYNC = "trainer.v1.trainer_mode=separate_async"
SAVE_CONTENTS = "checkpoint.save_contents=[optimizer,extra]"
HF_MODEL = "checkpoint.save_contents=[optimizer,hf_model]"
NO_TRIGGER = ("autoexport.trigger.on_train_end=false", "autoexport.trigger.on_request=false")

IMPOSSIBLE = [
    (
        [SAVED, "trainer.save_freq=-1"],
        "trainer.save_freq=-1: exports are made of verl's checkpoints and this run would write none; "
        "set trainer.save_freq=N, N ≥ 1, or autoexport.source=auto.",
    ),
    ([SAVED, "trainer.save_freq=0"], "trainer.save_freq=0: exports are made"),
    (
        [ASYNC, "trainer.save_freq=-1"],
        "exports are made of verl's checkpoints (trainer.v1.trainer_mode=separate_async, and only in sync, "
        "colocate_async are the weights of a step known to be in the workers when it is logged) and this run would "
        "write none; set trainer.save_freq=N, N ≥ 1.",
    ),
    ([ASYNC, f"actor_rollout_ref.actor.{SAVE_CONTENTS}"], "checkpoints would hold no weights; add 'model'."),
    (["autoexport.trigger.on_save=true", "trainer.save_freq=-1"], "autoexport.trigger.on_save=true: trainer.save_freq"),
    (
        [LIVE, ASYNC],
        "autoexport.source=live: trainer.v1.trainer_mode=separate_async, but the weights of a step",
    ),
    (
        [LIVE, "autoexport.trigger.on_save=true", "trainer.save_freq=-1"],
        "autoexport.trigger.on_save=true: trainer.save_freq=-1, this run saves nothing",
    ),
    (
        [LIVE, "autoexport.trigger.at_steps=[3,12]", "trainer.total_training_steps=11"],
        "autoexport.trigger.at_steps: [12] are beyond the last step, 11",
    ),
    (
        [SAVED, f"actor_rollout_ref.actor.{SAVE_CONTENTS}"],
        "actor_rollout_ref.actor.checkpoint.save_contents=['optimizer', 'extra']: checkpoints would hold no weights",
    ),
    (
        [SAVED, "autoexport.role=critic", "critic.enable=True", f"critic.{SAVE_CONTENTS}"],
        "critic.checkpoint.save_contents=['optimizer', 'extra']: checkpoints would hold no weights; add 'model'.",
    ),
    (
        ["actor_rollout_ref.actor.strategy=veomni"],
        "actor_rollout_ref.actor.strategy=veomni: exports need one of fsdp, fsdp2, megatron in this release.",
    ),
    (["autoexport.role=critic", "critic.strategy=veomni"], "critic.strategy=veomni: exports need one of fsdp, fsdp2"),
    (
        ["autoexport.weights.lora=both"],
        f"autoexport.weights.lora=both: this run trains no LoRA ({MODEL}.lora_rank=0); use fused, or set",
    ),
    (
        ["autoexport.role=critic", "critic.enable=True", f"{MODEL}.lora_rank=4", "autoexport.weights.lora=adapter"],
        "autoexport.weights.lora=adapter: this run trains no LoRA (critic.model.lora_rank=0)",
    ),
    (
        [f"{MODEL}.lora_rank=8", f"{MODEL}.lora_adapter_path=hdfs://a"],
        f"{MODEL}.lora_adapter_path=hdfs://a: exports need the adapter_config.json in it",
    ),
    (
        ["autoexport.role=critic", GRPO],
        "autoexport.role=critic: this run trains no critic (critic.enable=null, algorithm.adv_estimator=grpo)",
    ),
    (["autoexport.role=critic", "critic.enable=False"], "autoexport.role=critic: this run trains no critic"),
    (NO_TRIGGER, "autoexport.trigger: no trigger is on, nothing would ever be exported"),
    (
        [VAL],
        "autoexport.trigger.best.metric 'val-core/*/acc/mean@1' needs validation and trainer.test_freq=-1: this run "
        "never validates weights it trained; set trainer.test_freq=N, N ≥ 1.",
    ),
    (
        ["autoexport.trigger.threshold={metric:val-aux/x,above:0.5}"],
        "autoexport.trigger.threshold.metric 'val-aux/x' needs validation and trainer.test_freq=-1",
    ),
    (
        [SAVED, "autoexport.trigger.at_steps=[2,3,12]", "trainer.total_training_steps=11"],
        "autoexport.trigger.at_steps: no checkpoint at [3, 12]; trainer.save_freq=2 saves at its multiples and at the "
        "last step, 11. Choose among those or change trainer.save_freq.",
    ),
    (
        [SAVED, VAL, "trainer.save_freq=4", "trainer.test_freq=6", "trainer.total_training_steps=11"],
        "trainer.save_freq=4 and trainer.test_freq=6 meet first at step 12, beyond the last one, 11: only the last "
        "step could ever be chosen. Make one a multiple of the other.",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE, ids=lambda v: str(v)[:70])
def test_impossible_runs(verl_config, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        judge(verl_config(*overrides))


POSSIBLE = [
    [],
    ["actor_rollout_ref.actor.strategy=fsdp2"],
    # the other role's keys do not matter
    [f"critic.{SAVE_CONTENTS}", "critic.strategy=veomni"],
    ["autoexport.role=critic", f"actor_rollout_ref.actor.{SAVE_CONTENTS}"],
    [f"{MODEL}.lora_rank=8", "autoexport.weights.lora=adapter"],
    [f"{MODEL}.lora_rank=8", f"{MODEL}.lora_adapter_path=/a"],
    [f"{MODEL}.lora_adapter_path=hdfs://a"],  # without a rank verl does not look at it
    ["autoexport.role=critic", GRPO, "critic.enable=True"],
    [NO_TRIGGER[0]],
    ["autoexport.trigger.at_steps=[2,3,12]"],  # step 3 may be the last: judged when that is known
    ["autoexport.trigger.at_steps=[2,10,11]", "trainer.total_training_steps=11"],
    [SAVED, VAL, "trainer.save_freq=4", "trainer.test_freq=6"],
    [SAVED, VAL, "trainer.save_freq=4", "trainer.test_freq=6", "trainer.total_training_steps=12"],
    [SAVED, VAL, "trainer.save_freq=20", "trainer.test_freq=10", "trainer.total_training_steps=15"],
    [SAVED, VAL, "trainer.save_freq=10", "trainer.test_freq=20", "trainer.total_training_steps=15"],
    [SAVED, "trainer.save_freq=4", "trainer.test_freq=6", "trainer.total_training_steps=11"],  # no metric to judge
    ["trainer.default_hdfs_dir=hdfs://x"],
    [best("v*/acc"), "trainer.test_freq=2"],  # may match a val-* metric
    ["autoexport.enabled=false", "trainer.save_freq=-1"],
    [ASYNC],
    # where auto can be live nothing needs a checkpoint
    ["trainer.save_freq=-1", "trainer.v1.trainer_mode=colocate_async"],
    [f"actor_rollout_ref.actor.{SAVE_CONTENTS}"],
    [SAVED, f"actor_rollout_ref.actor.{HF_MODEL}"],
    ["autoexport.trigger.at_steps=[3]", "trainer.total_training_steps=11"],
    [VAL, "trainer.save_freq=4", "trainer.test_freq=6", "trainer.total_training_steps=11"],
    # the live source needs none
    [LIVE, "trainer.save_freq=-1", "trainer.v1.trainer_mode=colocate_async"],
    [LIVE, f"actor_rollout_ref.actor.{SAVE_CONTENTS}"],
    [LIVE, "autoexport.trigger.at_steps=[3]", "trainer.total_training_steps=11"],
    [LIVE, VAL, "trainer.save_freq=4", "trainer.test_freq=6", "trainer.total_training_steps=11"],
]


@pytest.mark.parametrize("overrides", POSSIBLE, ids=str)
def test_possible_runs(verl_config, overrides):
    assert judge(verl_config(*overrides)) == []


ACTOR = "actor_rollout_ref.actor"
IMPOSSIBLE_MEGATRON = [
    (
        [LIVE],
        f"autoexport.source=live: {ACTOR}.strategy=megatron, and Megatron's weights are not copied from the running "
        "workers; use autoexport.source=checkpoint.",
    ),
    (
        ["trainer.save_freq=-1"],
        f"exports are made of verl's checkpoints ({ACTOR}.strategy=megatron, and Megatron's weights are not copied "
        "from the running workers) and this run would write none; set trainer.save_freq=N, N ≥ 1.",
    ),
    ([f"{ACTOR}.{SAVE_CONTENTS}"], "checkpoints would hold no weights; add 'model'."),
    (
        [f"{ACTOR}.megatron.use_mbridge=False"],
        f"{ACTOR}.megatron.use_mbridge=False: verl would save Megatron's own format, which is not read; set "
        f"{ACTOR}.megatron.use_mbridge=True, or add 'hf_model' to {ACTOR}.checkpoint.save_contents.",
    ),
    (
        [f"{ACTOR}.megatron.use_dist_checkpointing=True"],
        f"{ACTOR}.megatron.use_dist_checkpointing=True: verl would save Megatron's own format, which is not read; set "
        f"{ACTOR}.megatron.use_dist_checkpointing=False, or add 'hf_model'",
    ),
    (
        [f"{ACTOR}.checkpoint.async_save=True"],
        f"{ACTOR}.checkpoint.async_save=True: verl marks such a save as complete later, or never",
    ),
    (
        [f"{MODEL}.lora.rank=8"],
        f"{MODEL}.lora.rank=8: of a LoRA run with {ACTOR}.strategy=megatron verl saves only the adapter",
    ),
    (
        ["autoexport.role=critic", "critic.enable=True"],
        "autoexport.role=critic: value models of critic.strategy=megatron are not exported; set role=actor.",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE_MEGATRON, ids=lambda v: str(v)[:70])
def test_impossible_runs_of_megatron(verl_config, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as e:
        judge(megatron(*overrides))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [SAVED],
        [f"{ACTOR}.{HF_MODEL}"],
        [f"{ACTOR}.{HF_MODEL}", f"{ACTOR}.megatron.use_dist_checkpointing=True"],
        [f"{ACTOR}.checkpoint.save_contents=[model,hf_model]", f"{ACTOR}.megatron.use_dist_checkpointing=True"],
        ["critic.megatron.use_mbridge=False", "critic.checkpoint.async_save=True"],
    ],
    ids=str,
)
def test_possible_runs_of_megatron(verl_config, overrides):
    cfg = megatron(*overrides)
    assert judge(cfg) == []
    kind, why = choose_source(cfg, load_config(cfg.autoexport))
    assert kind == "checkpoint"
    assert f"{ACTOR}.strategy=megatron, and Megatron's" in why or overrides == [SAVED]


def test_sft_with_megatron(verl_config):
    sft = [*SFT, "engine=megatron", "optim=megatron"]
    assert judge(compose("sft_trainer_engine", sft)) == []
    with pytest.raises(ConfigError, match=r"engine\.use_mbridge=False: verl would save Megatron's own format"):
        judge(compose("sft_trainer_engine", [*sft, "engine.use_mbridge=False"]))


def test_every_problem_of_a_run_is_told_at_once(verl_config):
    with pytest.raises(ConfigError) as e:
        judge(verl_config(SAVED, "trainer.save_freq=-1", "autoexport.weights.lora=both", VAL))
    assert [line.split(":")[0] for line in str(e.value).splitlines()][:2] == [
        "trainer.save_freq=-1",
        "autoexport.weights.lora=both",
    ]
    assert len(str(e.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (
            ["trainer.val_only=True", "trainer.save_freq=-1"],
            "trainer.val_only=true: this run only validates, nothing will",
        ),
        (
            [best("critic/score/mean")],
            "autoexport.trigger.best.metric 'critic/score/mean' is measured on earlier weights",
        ),
        (
            ["autoexport.trigger.threshold={metric:actor/*,below:1}"],
            "threshold.metric 'actor/*' is measured on earlier",
        ),
    ],
)
def test_warnings(verl_config, overrides, warning):
    [found] = judge(verl_config(*overrides))
    assert warning in found


def test_the_last_step_once_it_is_known(verl_config):
    cfg = verl_config(SAVED, "autoexport.trigger.at_steps=[3]", VAL, "trainer.save_freq=2", "trainer.test_freq=5")
    settings = load_config(cfg.autoexport)
    check_length(load_config({"output_dir": "x"}), cfg, 3)
    with pytest.raises(ConfigError, match=re.escape("at_steps: no checkpoint at [3]")) as e:
        check_length(settings, cfg, 10)
    assert "meet first" not in str(e.value)  # 10 is one of their common multiples
    with pytest.raises(
        ConfigError, match=r"^autoexport\.trigger\.best.* meet first at step 10, beyond the last one, 3"
    ):
        check_length(settings, cfg, 3)


NO_HOOK = [
    (["+async_training.staleness_threshold=0.1"], "async_training is in the configuration: verl's fully async trainer"),
    (
        ["+rollout.nnodes=1"],
        "rollout.nnodes is in the configuration: verl's one-step-off trainer trains while it samples",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), NO_HOOK, ids=lambda v: str(v)[:60])
def test_trainers_whose_steps_are_not_known(verl_config, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as e:
        check_trainer(verl_config(*overrides))
    assert "\n" not in str(e.value)


def test_ppo_of_any_kind_and_sft_are_known(verl_config):
    for overrides in ([], ["trainer.use_v1=False"], ["trainer.checkpoint_callback_class=my.Own"]):
        check_trainer(verl_config(*overrides))
    check_trainer(compose("sft_trainer_engine", ["+autoexport=default"]))
    for tree in ({}, {"trainer": {"use_v1": True}}):
        with pytest.raises(ConfigError, match=r"works in verl's PPO and SFT trainers; this configuration lacks"):
            check_trainer(OmegaConf.create(tree))


SFT = ["+autoexport=default", "model.path=m", "data.train_files=f", "trainer.default_local_dir=/ckpt"]
IMPOSSIBLE_SFT = [
    (["autoexport.source=live"], "autoexport.source=live: SFT's ranks are not read while they train"),
    (["autoexport.role=critic"], "autoexport.role=critic: SFT trains no critic"),
    (["engine.strategy=veomni"], "engine.strategy=veomni: exports need one of fsdp, fsdp2"),
    (["checkpoint.save_contents=[optimizer]"], "checkpoint.save_contents=['optimizer']: checkpoints would hold no"),
    (["autoexport.weights.lora=both"], "autoexport.weights.lora=both: this run trains no LoRA (model.lora_rank=0)"),
    (
        ["autoexport.trigger.best={metric:val/loss,mode:min}"],
        "autoexport.trigger.best.metric 'val/loss' needs validation and trainer.test_freq=-1",
    ),
    (
        ["autoexport.trigger.at_steps=[3]", "trainer.save_freq=2", "trainer.total_training_steps=4"],
        "no checkpoint at [3]",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE_SFT, ids=lambda v: str(v)[:60])
def test_impossible_runs_of_sft(verl_config, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        judge(compose("sft_trainer_engine", [*SFT, *overrides]))


def test_sft_saves_its_last_step_whatever_its_frequency(verl_config):
    assert judge(compose("sft_trainer_engine", [*SFT, "trainer.save_freq=-1"])) == []


def test_a_validation_of_sft_measures_these_weights_and_training_earlier_ones(verl_config):
    def warned(metric: str) -> list[str]:
        best = f"autoexport.trigger.best={{metric:{metric},mode:min}}"
        return judge(compose("sft_trainer_engine", [*SFT, best, "trainer.test_freq=2"]))

    assert warned("val/loss") == []
    assert ["'train/loss' is measured on earlier weights" in line for line in warned("train/loss")] == [True]


def test_the_flag_sets_guard_and_node(verl_config):
    cfg = verl_config("autoexport.trigger.every_n_steps=5", VAL, "trainer.default_local_dir=/ckpt/run")
    assert cfg.trainer.checkpoint_callback_class is None, "it is the user's own"
    config = load_config(cfg.autoexport)
    assert config.output_dir == Path("/ckpt/run/exports")
    assert config.trigger.every_n_steps == 5
    assert config.trigger.best[0].metric == "val-core/*/acc/mean@1"
    hydra = compose("ppo_trainer", ["+autoexport=default"], return_hydra_config=True).hydra
    assert hydra.callbacks.autoexport._target_ == "verl_autoexport.trainers.startup_guard.StartupGuard"
