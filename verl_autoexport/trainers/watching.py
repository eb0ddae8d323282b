"""Watches verl's trainers: their methods are wrapped, so that a run with the flag reports its events to a session.

Instances are wrapped, so that subclasses in recipes are followed, too. These facts hold in every verl from 0.5 on,
and tests check them on the wheels: `fit` builds the `Tracking` that logs each step; a trainer knows the step from
which it continues before `fit` trains; the metrics of a step are logged before its weights change.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from omegaconf import DictConfig, OmegaConf

from verl_autoexport.errors import ConfigError

if TYPE_CHECKING:
    from verl_autoexport.trainers.verl_ppo import PpoTrainer
    from verl_autoexport.trainers.verl_sft import SftTrainer

_MARK = "_autoexport"
_ADVICE = "remove +autoexport=default, and export finished checkpoints with `verl-autoexport export`."


def watch_trainer(cls: type[Any]) -> None:
    """Has every instance of a trainer's class, and of its subclasses, followed if its run has the flag."""
    init = cls.__init__
    if hasattr(init, _MARK):
        return

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        follow(self)

    vars(wrapped)[_MARK] = True
    cls.__init__ = wrapped


def watch_tracking(cls: type[Any]) -> None:
    """Has the logger of a followed trainer report each step; a trainer that is not followed is refused."""
    init, log = cls.__init__, cls.log
    if hasattr(init, _MARK):
        return

    @functools.wraps(init)
    def wrapped_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if Run.fitting is None:
            _check_unknown(sys._getframe(1))
        init(self, *args, **kwargs)
        if Run.fitting is not None:
            _runs[self] = Run.fitting

    @functools.wraps(log)
    def wrapped_log(self: Any, data: Mapping[str, object], step: int, *args: Any, **kwargs: Any) -> Any:
        result = log(self, data, step, *args, **kwargs)
        if (run := _runs.get(self)) is not None:
            run.logged(step, data)
        return result

    vars(wrapped_init)[_MARK] = True
    cls.__init__, cls.log = wrapped_init, wrapped_log


def follow(trainer: Any) -> None:
    """Has a trainer report to a session if its run has the flag, and a user's own callback called even if that is off.

    Raises ConfigError if the run cannot export.
    """
    if hasattr(trainer, _MARK) or not has_node(trainer):
        return
    vars(trainer)[_MARK] = True
    from verl_autoexport.trainers import verl_ppo

    if has_flag(trainer):
        _report(trainer)
    verl_ppo.chain(trainer)  # after this package, for every trainer that has the method


def _report(trainer: Any) -> None:
    if inspect.iscoroutinefunction(trainer.fit):
        raise ConfigError(f"{type(trainer).__name__} trains and samples at the same time, which is unknown: {_ADVICE}")
    if OmegaConf.select(trainer.config, "actor_rollout_ref") is not None:
        from verl_autoexport.trainers.verl_ppo import PpoTrainer as Adapter
    else:
        from verl_autoexport.trainers.verl_sft import SftTrainer as Adapter
    if Adapter.reports(trainer):
        Run(trainer, Adapter(trainer))


def has_node(trainer: Any) -> bool:
    config = getattr(trainer, "config", None)
    return isinstance(config, DictConfig) and OmegaConf.select(config, "autoexport") is not None


def has_flag(trainer: Any) -> bool:
    return has_node(trainer) and bool(OmegaConf.select(trainer.config, "autoexport.enabled"))


def _check_unknown(frame: FrameType | None) -> None:
    """Raises ConfigError if a trainer that nobody follows builds its logger in a run with the flag."""
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if has_flag(trainer) and not hasattr(trainer, _MARK):
            raise ConfigError(f"{type(trainer).__name__} is no trainer that autoexport knows: {_ADVICE}")
        frame = frame.f_back


class Run:
    """A followed trainer: it reports its events to a session, and all logs with one step number form one step.

    A step is complete once it is saved, another one is logged, or `fit` ends; if the trainer is known to log each
    step once, at once.
    """

    fitting: Run | None = None
    """The run whose `fit` is under way in this process."""
    ended: Run | None = None
    """The run whose exports may still be waited for."""

    def __init__(self, trainer: Any, adapter: PpoTrainer | SftTrainer) -> None:
        from verl_autoexport.config.reading import load_config
        from verl_autoexport.trainers.session import RunSession

        self.adapter, self.config = adapter, trainer.config
        self.session = RunSession(self.config, load_config(self.config.autoexport), adapter, adapter.service)
        self.loaded = False
        self.step, self.metrics = -1, {}
        adapter.attach(self)
        fit = trainer.fit

        @functools.wraps(fit)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._fit():
                return fit(*args, **kwargs)

        trainer.fit = wrapped

    @contextmanager
    def _fit(self) -> Iterator[None]:
        Run.fitting = self
        try:
            if self.loaded:
                self._begin()
            yield
        except BaseException:
            with suppress(Exception):  # training's own error is the one to raise
                self._over(False)
            raise
        finally:
            Run.fitting = None
        self._over(True)

    def resumed(self) -> None:
        """The trainer knows the step from which it continues: training begins, now or with `fit`."""
        self.loaded = True
        if Run.fitting is self:
            self._begin()

    def saved(self, step: int, directory: Path) -> None:
        self.session.saved(step, directory)
        if self.step == step:
            self._complete()

    def logged(self, step: int, data: Mapping[str, object]) -> None:
        if step != self.step:
            self._complete()
        self.step, self.metrics = step, self.metrics | dict(data)
        if self.adapter.logs_once:
            self._complete()

    def _begin(self) -> None:
        if not self.session.begun and not OmegaConf.select(self.config, "trainer.val_only"):
            self.session.begin()

    def _complete(self) -> None:
        if self.step >= 0:
            step, metrics, self.step, self.metrics = self.step, self.metrics, -1, {}
            self.session.logged(step, metrics)

    def _over(self, succeeded: bool) -> None:
        self.succeeded = False
        try:
            self._complete()
            self.session.end(succeeded)
            self.succeeded = succeeded
        finally:
            if self.adapter.waits_in_fit:
                self.drain()
            else:
                Run.ended = self

    def drain(self) -> None:
        self.session.drain(0 if self.succeeded else 1)


_runs: WeakKeyDictionary[Any, Run] = WeakKeyDictionary()


def drain() -> None:
    """Waits for the exports of a run whose `fit` has ended without waiting."""
    run, Run.ended = Run.ended, None
    if run is not None:
        run.drain()
