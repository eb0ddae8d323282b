"""The `autoexport` node: its keys, defaults, types and refusals."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl_autoexport.config.group import config_dir
from verl_autoexport.config.reading import load_config
from verl_autoexport.config.run_rules import check_run
from verl_autoexport.config.schema import AutoExportConfig, KeepConfig, parse_size
from verl_autoexport.errors import ConfigError
from verl_autoexport.registry.retention import Keep
from verl_autoexport.trainers.hook import RESOLVER, watch_modules

TRIGGER_KEYS = (
    "every_n_steps, at_steps, every_seconds, on_save, on_train_end, on_request, best, threshold, min_steps_between"
)


def load(**node) -> AutoExportConfig:
    return load_config({"output_dir": "out", **node})


def trigger(**keys) -> dict:
    return {"trigger": keys}


def test_the_group_file_holds_exactly_the_defaults():
    node = OmegaConf.load(config_dir() / "autoexport" / "default.yaml").autoexport
    written = OmegaConf.to_container(node, resolve=False)
    assert written.pop("output_dir") == "${trainer.default_local_dir}/exports"
    assert written["hook"] == f"${{{RESOLVER}:}}"
    watch_modules()  # without which nobody can resolve it
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
    ({"chain_callback": "verl_autoexport.AutoExportCallback"}, "chain_callback: expected your own callback, found"),
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


def test_missing_nodes_are_not_judged():
    settings = load(**trigger(best={"metric": "val-x"}, at_steps=[3]))
    for tree in ({}, {"trainer": {"save_freq": None}}, {"trainer": 5}, {"trainer": {"save_freq": "${gone}"}}):
        assert check_run(OmegaConf.create(tree), settings) == []
