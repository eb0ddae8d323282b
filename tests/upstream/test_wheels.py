"""The names and the order of calls on which the hook relies, in the wheel of every verl from 0.5.0 to 0.9.1.

The wheels are parsed, not installed. A failure names the version and what changed in it.
"""

from __future__ import annotations

import ast

import pytest

from tests.support.wheels import VERSIONS, find, lines, sources
from verl_autoexport.trainers.hook import TRACKING, TRAINERS

PPO = ("verl.trainer.ppo.v1.trainer_base", "verl.trainer.ppo.ray_trainer", "verl.trainer.main_ppo_sync")
SPANS = {
    "verl.trainer.ppo.v1.trainer_base": ("0.9.0", "0.9.1"),
    "verl.trainer.ppo.ray_trainer": ("0.5.0", "0.9.1"),
    "verl.trainer.main_ppo_sync": ("0.8.0", "0.8.0"),
    "verl.trainer.sft_trainer": ("0.6.0", "0.9.1"),
    "verl.trainer.sft_trainer_ray": ("0.7.0", "0.9.1"),
    "verl.trainer.fsdp_sft_trainer": ("0.5.0", "0.7.0"),
}
"""The first and the last version with a module."""
OF_VERSION = [(v, m) for v in VERSIONS for m, (first, last) in SPANS.items() if first <= v <= last]
REFUSED = {"SeparateRayPPOTrainer", "OneStepOffRayTrainer", "FullyAsyncTrainer"}
"""Trainers with a `Tracking` of their own that train and sample at the same time; their runs are refused."""


def trainer(version: str, module: str) -> ast.ClassDef:
    return find(ast.parse(sources(version)[module]), TRAINERS[module])


def method(cls: ast.ClassDef, name: str) -> ast.FunctionDef:
    return find(cls, name)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_has_the_modules_that_are_checked_here(version: str) -> None:
    assert TRAINERS.keys() == SPANS.keys()
    assert {m for m in TRAINERS if m in sources(version)} == {m for v, m in OF_VERSION if v == version}


@pytest.mark.parametrize("version", VERSIONS)
def test_tracking_is_made_and_logs_as_it_is_wrapped(version: str) -> None:
    tracking = find(ast.parse(sources(version)[TRACKING]), "Tracking")
    log = [a.arg for a in method(tracking, "log").args.args]
    assert log == ["self", "data", "step", "backend"], f"verl {version}: Tracking.log takes {log}"
    assert method(tracking, "__init__")
    assert not any("__slots__" in ast.unparse(n) for n in tracking.body), "a Tracking can no longer be a weak key"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_class_with_a_logger_of_a_run_is_known(version: str) -> None:
    """A new trainer must be watched, or refused."""
    found = set()
    for module, source in sources(version).items():
        if "Tracking(" in source:
            classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
            found |= {(module, c.name) for c in classes if lines(c, "Tracking")}
    unknown = {f"{m}.{c}" for m, c in found if TRAINERS.get(m) != c and c not in REFUSED}
    assert not unknown, f"verl {version}: these make a Tracking: {unknown}"


@pytest.mark.parametrize(("version", "module"), OF_VERSION)
def test_trainers_set_their_config_first_and_have_one_fit(version: str, module: str) -> None:
    cls = trainer(version, module)
    init = ast.unparse(method(cls, "__init__"))
    assert "self.config = config" in init, f"verl {version}: {cls.name} does not set its config"
    assert isinstance(method(cls, "fit"), ast.FunctionDef), f"verl {version}: {cls.name}.fit is asynchronous"
    assert len(lines(method(cls, "fit"), "Tracking")) == 1, f"verl {version}: fit makes several loggers, or none"


@pytest.mark.parametrize(("version", "module"), [(v, m) for v, m in OF_VERSION if m in PPO])
def test_ppo_saves_and_then_logs_a_step_before_the_next_one_trains(version: str, module: str) -> None:
    cls = trainer(version, module)
    fit = method(cls, "fit")
    (loop,) = [n for n in fit.body if isinstance(n, ast.For | ast.While)]
    (saved,), (logged,) = lines(loop, "self._save_checkpoint"), lines(loop, "logger.log", "self.logger.log")
    updates = lines(
        loop, "self._update_actor", "self.actor_rollout_wg.update_actor", "self.actor_wg.update_actor", "self.step"
    )
    assert updates, f"verl {version}: nothing in fit updates the actor"
    assert max(updates) < saved < logged, f"verl {version}: the order of a step: {updates}, {saved}, {logged}"
    counted = [
        n.lineno
        for n in ast.walk(loop)
        if isinstance(n, ast.AugAssign) and ast.unparse(n.target) == "self.global_steps"
    ]
    assert counted, f"verl {version}: global_steps is not counted in fit"
    assert min(counted) > logged, f"verl {version}: a step is logged under another number than it is saved"


@pytest.mark.parametrize(("version", "module"), [(v, m) for v, m in OF_VERSION if m in PPO])
def test_ppo_loads_before_it_trains_and_has_what_is_read_of_it(version: str, module: str) -> None:
    cls = trainer(version, module)
    fit, loads = method(cls, "fit"), method(cls, "_load_checkpoint")
    assert "self.global_steps = " in ast.unparse(loads) + ast.unparse(fit)
    (loop,) = [n for n in fit.body if isinstance(n, ast.For | ast.While)]
    inside = lines(fit, "self._load_checkpoint")
    before = [line for m in cls.body if isinstance(m, ast.FunctionDef) for line in lines(m, "self._load_checkpoint")]
    assert before, f"verl {version}: nobody calls _load_checkpoint"
    if inside:
        first_log = min(lines(fit, "logger.log", "self.logger.log"))
        assert lines(fit, "Tracking")[0] < inside[0] < first_log < loop.lineno
    source = ast.unparse(cls)
    for name in ("self.total_training_steps", "self.train_dataloader", "self.actor_rollout_wg", "self.critic_wg"):
        assert f"{name} = " in source, f"verl {version}: {name} is not assigned"
    save = ast.unparse(method(cls, "_save_checkpoint"))
    folder = "os.path.join(self.config.trainer.default_local_dir, f'global_step_{self.global_steps}')"
    assert folder in save, f"verl {version}: checkpoints lie elsewhere"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_configuration_is_resolved_where_the_trainer_runs(version: str) -> None:
    """That stops a run whose driver lacks the hook: only the hook can resolve `autoexport.hook`."""
    for module in PPO:
        if (source := sources(version).get(module)) is not None:
            fit = method(find(ast.parse(source), TRAINERS[module]), "fit")
            (made,) = [n for n in ast.walk(fit) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Tracking"]
            assert "OmegaConf.to_container(self.config, resolve=True)" in ast.unparse(made), f"verl {version}: {module}"


@pytest.mark.parametrize(("version", "module"), [(v, m) for v, m in OF_VERSION if m not in PPO])
def test_sft_logs_a_step_and_then_saves_it(version: str, module: str) -> None:
    cls = trainer(version, module)
    fit = method(cls, "fit")
    logs, saves = lines(fit, "tracking.log"), lines(fit, "self.ckpt_handler.save_checkpoint", "self.save_checkpoint")
    assert len(saves) == 1, f"verl {version}: {module} saves at {saves}"
    assert len(logs) == 2, f"verl {version}: {module} logs at {logs}"
    assert max(logs) < saves[0], f"verl {version}: {module} logs after it saves"
    source = ast.unparse(cls)
    for name in ("self.resume_global_step = ", "self.train_dataloader"):
        assert name in source, f"verl {version}: {module} has no {name}"
    owner = find(ast.parse(sources(version)["verl.utils.checkpoint.checkpoint_handler"]), "CheckpointHandler") if (
        "ckpt_handler" in source
    ) else cls  # fmt: skip
    save = method(owner, "save_checkpoint")
    assert [a.arg for a in save.args.args] == ["self", "step"]
    assert "f'global_step_{step}'" in ast.unparse(save)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_way_to_the_module_in_a_worker(version: str) -> None:
    """`find_engine` knows workers that hold the module themselves, and those with an engine."""
    found = sources(version)
    legacy = found.get("verl.workers.fsdp_workers", "")
    engine = found.get("verl.workers.engine_workers", "")
    assert "self.actor_module_fsdp" in legacy or "self.actor.engine" in engine or "self.engine = " in engine
    if legacy:
        for name in (
            "self.actor_module_fsdp",
            "self.critic_module",
            "self.checkpoint_manager = FSDPCheckpointManager(",
        ):
            assert name in legacy, f"verl {version}: fsdp_workers has no {name}"
