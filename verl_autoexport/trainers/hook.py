"""The hook in a process: classes of verl that are imported from now on report their events. No file of verl changes.

The launching process installs it, and gives it to the run's Ray workers as Ray's `worker_process_setup_hook`.
Nothing of verl, torch or Ray is imported here: a process that does not train only gets a finder of modules.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

RESOLVER = "call_verl_autoexport_install_before_ray_init"
"""The interpolation in `autoexport.hook`, which only a process with the hook can resolve; its name is the advice."""
TRACKING = "verl.utils.tracking"
TRAINERS: Mapping[str, str] = {
    "verl.trainer.ppo.v1.trainer_base": "PPOTrainer",
    "verl.trainer.ppo.ray_trainer": "RayPPOTrainer",
    "verl.trainer.main_ppo_sync": "PPOTrainer",
    "verl.trainer.sft_trainer": "SFTTrainer",
    "verl.trainer.sft_trainer_ray": "SFTTrainer",
    "verl.trainer.fsdp_sft_trainer": "FSDPSFTTrainer",
}
"""The class of each module whose instances, and those of its subclasses, are watched; not every verl has them all."""
_ENV_HOOK = "worker_process_setup_hook"


class _Finder(MetaPathFinder):
    """Finds `modules` as the other finders do, and calls back once one is executed."""

    def __init__(self, modules: Collection[str], executed: Callable[[ModuleType, str], None]) -> None:
        self.modules, self.executed = modules, executed

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.modules:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for f in others if (s := f.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.executed(module, name)

            vars(spec.loader)["exec_module"] = exec_module
        return spec


def install() -> None:
    """Puts the hook into this process, and into the workers of a Ray that this process starts later.

    For launchers of your own: call it before `ray.init`, or name it there, as
    `ray.init(runtime_env={"worker_process_setup_hook": "verl_autoexport.install"})`.
    """
    watch_modules()
    _once_imported(("ray",), _wrap_init)
    main = sys.modules["__main__"]  # `python -m` executes verl's program as this module
    spec = getattr(main, "__spec__", None)
    if spec is not None and hasattr(main, TRAINERS.get(spec.name, "")):
        _watch(main, spec.name)


def watch_modules() -> None:
    """Puts the hook into this process only; does nothing if it is there already."""
    if OmegaConf.has_resolver(RESOLVER):
        return
    OmegaConf.register_new_resolver(RESOLVER, lambda: True)
    _once_imported((TRACKING, *TRAINERS), _watch)


def _once_imported(modules: Collection[str], call: Callable[[ModuleType, str], None]) -> None:
    """Calls `call` with each of the modules and its name: now if it is imported already, or when it is."""
    sys.meta_path.insert(0, _Finder(modules, call))
    for name in modules:
        if name in sys.modules:
            call(sys.modules[name], name)


def _watch(module: ModuleType, name: str) -> None:
    from verl_autoexport.trainers import watching

    if name == TRACKING:
        watching.watch_tracking(module.Tracking)
    else:
        watching.watch_trainer(getattr(module, TRAINERS[name]))


def _wrap_init(ray: Any, name: str) -> None:
    """Has `ray.init` give its workers the hook."""
    init = ray.init
    if hasattr(init, "_autoexport") or ray.is_initialized():
        return

    @functools.wraps(init)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        env = dict(kwargs.get("runtime_env") or {})
        kwargs["runtime_env"] = env | {_ENV_HOOK: _chained(env.get(_ENV_HOOK))}
        return init(*args, **kwargs)

    vars(wrapped)["_autoexport"] = True
    ray.init = wrapped


def _chained(users: str | Callable[[], None] | None) -> str | Callable[[], None]:
    """Ray's setup hook for its workers: this package's, after which the user's own runs, too."""
    ours = f"{__name__}.{watch_modules.__name__}"
    if users is None or users == ours:
        return ours

    def both() -> None:
        watch_modules()
        call = users
        if isinstance(call, str):
            module, _, name = call.rpartition(".")
            call = getattr(importlib.import_module(module), name)
        call()

    return both
