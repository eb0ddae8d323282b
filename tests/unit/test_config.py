"""The `autoexport` node, the checks of the run around it, and the Hydra group."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from verl_autoexport.config.group import config_dir
from verl_autoexport.config.reading import load_config
from verl_autoexport.config.run_rules import CALLBACK, check_hook, check_length, check_run
from verl_autoexport.config.schema import AutoExportConfig, KeepConfig, parse_size
from verl_autoexport.errors import ConfigError
from verl_autoexport.registry.retention import Keep

TRIGGER_KEYS = (
    "every_n_steps, at_steps, every_seconds, on_save, on_train_end, on_request, best, threshold, min_steps_between"
)


def load(**node) -> AutoExportConfig:
    return load_config({"output_dir": "out", **node})


def trigger(**keys) -> dict:
    return {"trigger": keys}


# --- the node ---------------------------------------------------------------------------------


def test_the_group_file_holds_exactly_the_defaults():
    node = OmegaConf.load(config_dir() / "autoexport" / "default.yaml").autoexport
    written = OmegaConf.to_container(node, resolve=False)
    assert written.pop("output_dir") == "${trainer.default_local_dir}/exports"
    assert load_config({"output_dir": "out", **written}) == load()

    def keys(tree: dict) -> dict:
        return {k: keys(v) if isinstance(v, dict) else None for k, v in tree.items()}

    structured = OmegaConf.to_container(OmegaConf.structured(AutoExportConfig))
    assert keys(written) == keys({k: v for k, v in structured.items() if k != "output_dir"})


def test_values_arrive_typed():
    config = load(
        source="checkpoint",
        trigger={
            "every_n_steps": "3",
            "at_steps": [9, 2, 9],
            "every_seconds": 60,
            "best": {"metric": "val-core/a", "mode": "min", "min_delta": 0.5},
            "threshold": [{"metric": "m", "above": 0.8}, {"metric": "m", "below": -1, "once": False}],
        },
        weights={"dtype": "source", "max_shard_size": "100MiB"},
        verify={"load": True, "generate": False},
        chain_callback="my.own.Callback",
    )
    t = config.trigger
    assert (t.every_n_steps, t.at_steps, t.every_seconds) == (3, (2, 9), 60.0)
    assert [(b.name, b.metric, b.mode, b.min_delta) for b in t.best] == [("best", "val-core/a", "min", 0.5)]
    assert [(x.name, x.above, x.below, x.once) for x in t.threshold] == [
        ("m>0.8", 0.8, None, True),
        ("m<-1", None, -1.0, False),
    ]
    assert config.weights.max_shard_size == 100 * 2**20
    assert (config.verify.load, config.verify.generate) == (True, False)
    assert config.chain_callback == "my.own.Callback"
    assert t.metrics == (
        ("autoexport.trigger.best.metric", "val-core/a"),
        ("autoexport.trigger.threshold.metric", "m"),
        ("autoexport.trigger.threshold.metric", "m"),
    )


@pytest.mark.parametrize(
    ("best", "names"),
    [
        (None, []),
        ([], []),
        ({"metric": "a"}, ["best"]),
        ([{"metric": "a"}, {"metric": "a", "mode": "min", "name": "low-er_1.0"}], ["best", "low-er_1.0"]),
    ],
)
def test_best_is_null_a_mapping_or_a_list(best, names):
    assert [b.name for b in load(**trigger(best=best)).trigger.best] == names


def test_output_dir_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(output_dir="a/../b").output_dir == tmp_path / "b"
    assert load(output_dir="/x//y").output_dir == Path("/x/y")
    assert load(output_dir="~/z").output_dir == Path.home() / "z"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "base", "source"])
def test_every_dtype_is_available(dtype):
    assert load(weights={"dtype": dtype}).weights.dtype == dtype


def test_interpolations_resolve_in_the_whole_configuration():
    cfg = OmegaConf.create(
        {"trainer": {"dir": "/ckpt", "n": 4}, "autoexport": {"output_dir": "${trainer.dir}/exports"}}
    )
    cfg.autoexport.trigger = {"every_n_steps": "${trainer.n}"}
    OmegaConf.set_struct(cfg, True)
    OmegaConf.set_readonly(cfg, True)
    config = load_config(cfg.autoexport)
    assert (config.output_dir, config.trigger.every_n_steps) == (Path("/ckpt/exports"), 4)


REFUSED = [  # the message goes on after `autoexport.`
    # unknown keys: full key, nearest names, all valid keys
    (
        trigger(every_n_step=2),
        "trigger.every_n_step is not a key. Did you mean autoexport.trigger.every_n_steps or "
        f"autoexport.trigger.every_seconds? Keys of autoexport.trigger: {TRIGGER_KEYS}.",
    ),
    ({"min_steps_between": 2}, "min_steps_between is not a key. Did you mean autoexport.trigger.min_steps_between?"),
    ({"qqq": 2}, "qqq is not a key. Keys of autoexport: enabled, output_dir, source, role, trigger, "),
    (trigger(best={"metrik": "a"}), "trigger.best.metrik is not a key. Did you mean autoexport.trigger.best.metric?"),
    (trigger(threshold=[{"metric": "a", "over": 1}]), "trigger.threshold[0].over is not a key."),
    ({1: 2}, "1 is not a key."),
    # wrong types
    (trigger(every_n_steps=True), "trigger.every_n_steps: expected a whole number, found true."),
    (trigger(every_n_steps=2.5), "trigger.every_n_steps: expected a whole number, found 2.5."),
    (trigger(every_n_steps="2.5"), 'trigger.every_n_steps: expected a whole number, found "2.5".'),
    (trigger(every_n_steps=[2]), "trigger.every_n_steps: expected a whole number, found [2]."),
    (trigger(at_steps=5), "trigger.at_steps: expected a list of whole numbers such as [10, 50], found 5."),
    (
        trigger(at_steps=[1, True]),
        "trigger.at_steps: expected a list of whole numbers such as [10, 50], found [1, true]",
    ),
    (trigger(at_steps=None), "trigger.at_steps: expected a list of whole numbers such as [10, 50], found null."),
    (trigger(on_save=5), "trigger.on_save: expected true or false, found 5."),
    (trigger(on_save="often"), 'trigger.on_save: expected true or false, found "often".'),
    (trigger(every_seconds=True), "trigger.every_seconds: expected a number, found true."),
    (trigger(every_seconds="inf"), 'trigger.every_seconds: expected a finite number, found "inf".'),
    (trigger(best={"metric": 3}), "trigger.best.metric: expected a text, found 3."),
    (trigger(best={"metric": ""}), 'trigger.best.metric: expected a text, found "".'),
    (trigger(best="a"), 'trigger.best: expected a mapping (keys: metric, mode, min_delta, name), found "a".'),
    ({"verify": None}, "verify: expected a mapping (keys: load, generate, max_memory, timeout_s), found null."),
    ({"verify": {"load": 1}}, "verify.load: expected one of true | false | auto, found 1."),
    ({"verify": {"load": "yes"}}, 'verify.load: expected one of true | false | auto, found "yes".'),
    ({"merge": {"workers": 1.5}}, "merge.workers: expected a whole number, found 1.5."),
    # values out of range
    (trigger(every_n_steps=0), "trigger.every_n_steps: expected 1 or more, found 0."),
    (trigger(at_steps=[4, 0]), "trigger.at_steps: expected 1 or more, found 0."),
    (trigger(every_seconds=0), "trigger.every_seconds: expected more than 0, found 0.0."),
    (trigger(min_steps_between=-1), "trigger.min_steps_between: expected 0 or more, found -1."),
    (trigger(best={"metric": "a", "min_delta": -0.1}), "trigger.best.min_delta: expected 0 or more, found -0.1."),
    ({"merge": {"workers": 0}}, "merge.workers: expected 1 or more, found 0."),
    ({"merge": {"placement": {"node": "x"}}}, "merge.placement: expected {resources: {name: amount}} and/or"),
    (
        {"merge": {"placement": {"resources": {"GPU": 1}}}},
        "merge.placement.resources.GPU: expected a resource of your own",
    ),
    ({"merge": {"placement": {"labels": {"zone": 1}}}}, "merge.placement.labels.zone: expected"),
    ({"merge": {"num_cpus": 0}}, "merge.num_cpus: expected more than 0, found 0.0."),
    ({"queue": {"drain_timeout_s": -1}}, "queue.drain_timeout_s: expected 0 or more, found -1.0."),
    # enumerations
    ({"source": "hf"}, 'source: expected one of auto | live | checkpoint, found "hf".'),
    ({"role": "ref"}, 'role: expected one of actor | critic, found "ref".'),
    ({"on_error": "ignore"}, 'on_error: expected one of warn | raise, found "ignore".'),
    ({"queue": {"overflow": "drop"}}, 'queue.overflow: expected one of coalesce | wait | skip, found "drop".'),
    (
        {"weights": {"dtype": "bf16"}},
        "weights.dtype: expected one of bfloat16 | float16 | float32 | base | source, found",
    ),
    (trigger(best={"metric": "a", "mode": "up"}), 'trigger.best.mode: expected one of max | min, found "up".'),
    # sizes, directories, classes
    ({"weights": {"max_shard_size": "5G"}}, "weights.max_shard_size: expected a size such as 5GB or 512MiB, found"),
    ({"verify": {"max_memory": None}}, "verify.max_memory: expected a size such as 5GB or 512MiB, found null."),
    (
        {"output_dir": "s3://bucket/x"},
        'output_dir: expected a directory that this node can reach, found "s3://bucket/x". '
        "URLs are not: upload afterwards.",
    ),
    ({"output_dir": "file:///x"}, "output_dir: expected a directory that this node can reach"),
    ({"output_dir": " "}, 'output_dir: expected the path of a directory, found " ".'),
    ({"output_dir": "???"}, "output_dir has no value: Missing mandatory value: output_dir. Set it."),
    ({"output_dir": "${nowhere}/x"}, "output_dir has no value: Interpolation key 'nowhere' not found. Set it."),
    ({"chain_callback": "Mine"}, 'chain_callback: expected a class as package.module.Class, found "Mine".'),
    ({"chain_callback": CALLBACK}, "chain_callback: expected your own callback, found"),
    # several keys together
    (trigger(best={"mode": "max"}), "trigger.best.metric is required and not set."),
    (
        trigger(best=[{"metric": "a"}, {"metric": "b"}]),
        'trigger.best.name: expected a different name for each entry, found "best". Two have this one.',
    ),
    (
        trigger(best={"metric": "a", "name": "a/b"}),
        "trigger.best.name: expected at most 100 letters, digits, '_', '.' and '-', found",
    ),
    (
        trigger(best={"metric": "a", "name": ".."}),
        "trigger.best.name: expected at most 100 letters, digits, '_', '.' and '-', found",
    ),
    (
        trigger(threshold={"metric": "a"}),
        "trigger.threshold (a): expected one of above, below; found above=null and below=null.",
    ),
    (
        trigger(threshold={"metric": "a", "above": 1, "below": 2}),
        "trigger.threshold (a): expected one of above, below; found above=1.0",
    ),
    (trigger(threshold=[{"metric": "a", "above": 1}] * 2), "trigger.threshold: expected each threshold once"),
    *(
        ({"keep": {key: value}}, f"keep.{key}: expected {expected}, found {shown}")
        for key in ("last", "best", "every_n_steps")
        for value, expected, shown in ((0, "1 or more", "0"), ("all", "a whole number", '"all"'), (-3, "1 or more", -3))
    ),
    ({"keep": {"last": 2.5}}, "keep.last: expected a whole number, found 2.5"),
    ({"keep": {"max_bytes": 0}}, "keep.max_bytes: expected a size such as 5GB or 512MiB, found 0"),
    ({"keep": {"max_bytes": "much"}}, 'keep.max_bytes: expected a size such as 5GB or 512MiB, found "much"'),
    ({"keep": {"max_bytes": True}}, "keep.max_bytes: expected a size such as 5GB or 512MiB, found true"),
    ({"keep": {"newest": 3}}, "keep.newest is not a key."),
    ({"keep": {"best": 3}}, "keep.best=3 needs autoexport.trigger.best, whose metric it ranks by."),
]


def test_keep():
    keep = load(
        keep={"last": 3, "best": "2", "every_n_steps": 100, "max_bytes": "1.5TB"}, **trigger(best={"metric": "a"})
    ).keep
    assert keep == KeepConfig(last=3, best=2, every_n_steps=100, max_bytes=1_500_000_000_000)
    assert load().keep == KeepConfig()
    assert {f.name for f in fields(KeepConfig)} == {f.name for f in fields(Keep)}, (
        "the run hands it over field by field"
    )


@pytest.mark.parametrize(("node", "message"), REFUSED, ids=lambda v: str(v)[:60])
def test_refused(node, message):
    with pytest.raises(ConfigError, match="^" + re.escape(f"autoexport.{message}")):
        load(**{str(k): v for k, v in node.items()})


@pytest.mark.parametrize("node", [None, 5, ["a"], {}], ids=str)
def test_a_node_that_is_none(node):
    with pytest.raises(ConfigError, match=r"^autoexport(: expected a mapping|\.output_dir is required)"):
        load_config(node)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (7, 7), ("7", 7), ("7B", 7), ("5GB", 5 * 10**9), ("0.1 GB", 10**8), ("1.5kb", 1500),
        ("2MB", 2 * 10**6), ("3TB", 3 * 10**12), ("1KiB", 1024), ("16GiB", 2**34), ("1MiB", 2**20), ("1TiB", 2**40),
    ],
)  # fmt: skip
def test_sizes(value, size):
    assert parse_size(value, "--max-shard-size") == size


@pytest.mark.parametrize("value", ["", "GB", "-5GB", "5 5GB", "5XB", "1e9", "0GB", 0, -1, 2.0, True, None, [1]])
def test_sizes_that_are_none(value):
    with pytest.raises(ConfigError, match=r"^--max-shard-size: expected a size such as 5GB or 512MiB, found "):
        parse_size(value, "--max-shard-size")


# --- the run around it ------------------------------------------------------------------------

VERL_CONFIGS = Path(importlib.util.find_spec("verl").submodule_search_locations[0]) / "trainer" / "config"


@pytest.fixture(scope="module")
def verl_config():
    """verl's own configuration with our group, composed as its main composes it."""
    with initialize_config_dir(str(VERL_CONFIGS), version_base=None):
        yield lambda *overrides: compose("ppo_trainer", ["+autoexport=default", "trainer.save_freq=2", *overrides])


def judge(cfg) -> list[str]:
    return check_run(cfg, load_config(cfg.autoexport))


def best(metric: str) -> str:
    return f"autoexport.trigger.best={{metric:{metric},mode:max}}"


GRPO = "algorithm.adv_estimator=grpo"
MODEL = "actor_rollout_ref.model"
VAL = best("val-core/*/acc/mean@1")
LIVE, SAVED = "autoexport.source=live", "autoexport.source=checkpoint"
ASYNC = "trainer.v1.trainer_mode=separate_async"
SAVE_CONTENTS = "checkpoint.save_contents=[optimizer,hf_model]"
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
        "actor_rollout_ref.actor.checkpoint.save_contents=['optimizer', 'hf_model']: checkpoints would hold no weights",
    ),
    (
        [SAVED, "autoexport.role=critic", "critic.enable=True", f"critic.{SAVE_CONTENTS}"],
        "critic.checkpoint.save_contents=['optimizer', 'hf_model']: checkpoints would hold no weights; add 'model'.",
    ),
    (
        ["actor_rollout_ref.actor.strategy=megatron"],
        "actor_rollout_ref.actor.strategy=megatron: exports need one of fsdp, fsdp2 in this release.",
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


def test_missing_nodes_are_not_judged():
    settings = load(**trigger(best={"metric": "val-x"}, at_steps=[3]))
    for tree in ({}, {"trainer": {"save_freq": None}}, {"trainer": 5}, {"trainer": {"save_freq": "${gone}"}}):
        assert check_run(OmegaConf.create(tree), settings) == []


NO_HOOK = [
    (
        ["trainer.use_v1=False"],
        "trainer.use_v1=False: verl's legacy trainer never calls checkpoint callbacks, nothing would",
    ),
    (
        ["trainer.checkpoint_callback_class=my.Own"],
        "trainer.checkpoint_callback_class=my.Own: verl_autoexport.AutoExportCallback would not be called and nothing "
        "exported; set autoexport.chain_callback=my.Own instead.",
    ),
    (
        ["trainer.checkpoint_callback_class=null"],
        "trainer.checkpoint_callback_class=null: verl_autoexport.AutoExportCallback",
    ),
    (["+async_training.staleness_threshold=0.1"], "async_training is in the configuration: verl's fully async trainer"),
    (["+rollout.nnodes=1"], "rollout.nnodes is in the configuration: verl's one-step-off trainer never calls"),
    (["~trainer.use_v1"], "trainer.use_v1=null: verl's legacy trainer"),
]


@pytest.mark.parametrize(("overrides", "message"), NO_HOOK, ids=lambda v: str(v)[:60])
def test_runs_that_would_never_call_us(verl_config, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as e:
        check_hook(verl_config(*overrides))
    assert "\n" not in str(e.value)


def test_other_trainers_that_would_never_call_us(verl_config):
    check_hook(verl_config())
    for tree in ({}, {"trainer": {"use_v1": True}}):
        with pytest.raises(ConfigError, match=r"works in verl's PPO trainer .* lacks `trainer` or `actor_rollout_ref`"):
            check_hook(OmegaConf.create(tree))
    sft = compose("sft_trainer_engine", ["+autoexport=default"])
    with pytest.raises(ConfigError, match=r"lacks `trainer` or `actor_rollout_ref` \(SFT\?\)"):
        check_hook(sft)


# --- the group --------------------------------------------------------------------------------


def test_the_flag_sets_callback_guard_and_node(verl_config):
    cfg = verl_config("autoexport.trigger.every_n_steps=5", VAL, "trainer.default_local_dir=/ckpt/run")
    assert cfg.trainer.checkpoint_callback_class == CALLBACK
    config = load_config(cfg.autoexport)
    assert config.output_dir == Path("/ckpt/run/exports")
    assert config.trigger.every_n_steps == 5
    assert config.trigger.best[0].metric == "val-core/*/acc/mean@1"
    hydra = compose("ppo_trainer", ["+autoexport=default"], return_hydra_config=True).hydra
    assert hydra.callbacks.autoexport._target_ == "verl_autoexport.trainers.startup_guard.StartupGuard"


def test_importing_stays_light():
    code = (
        "import sys, verl_autoexport.config.run_rules, verl_autoexport.milestones.triggers; "
        "import hydra_plugins.autoexport_searchpath; "
        "print([m for m in ('torch', 'ray', 'transformers', 'verl') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_a_broken_installation_of_ours_breaks_no_other_hydra_application():
    code = (
        "import sys; from hydra._internal.config_search_path_impl import ConfigSearchPathImpl; "
        "from hydra_plugins.autoexport_searchpath import AutoExportSearchPath; "
        "sys.modules['verl_autoexport'] = None; path = ConfigSearchPathImpl(); "
        "AutoExportSearchPath().manipulate_search_path(path); print(path.get_path())"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
