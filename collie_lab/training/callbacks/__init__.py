"""The callbacks of a run on a rank: those of the experiment, in its order, behind the face of one."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import override

from collie_lab import cells
from collie_lab.cells import Callback, Experiment
from collie_lab.training.callbacks.compilation import Compilation
from collie_lab.training.callbacks.monitors import EarlyStop, KeepBest
from collie_lab.training.callbacks.profiler import Profiler
from collie_lab.training.callbacks.statistics import TensorStatistics
from collie_lab.training.callbacks.system import SystemThread

__all__ = ["Callbacks"]


class Callbacks(Callback):
    """Calls every callback of an experiment. All ranks have all of them: some do their work on rank 0 alone."""

    def __init__(self, experiment: Experiment):
        self._each: dict[str, Callback] = {}
        for item in experiment.callbacks:
            name, number = type(item).__name__, 1
            while name in self._each:
                number += 1
                name = f"{type(item).__name__} {number}"
            self._each[name] = _build(item, experiment)
        if experiment.training.compile:
            self._each["the compiler"] = Compilation()

    @override
    def on_start(self, trainer: Any) -> None:
        for callback in self._each.values():
            callback.on_start(trainer)

    @override
    def before_step(self, trainer: Any) -> None:
        for callback in self._each.values():
            callback.before_step(trainer)

    @override
    def before_update(self, trainer: Any) -> None:
        for callback in self._each.values():
            callback.before_update(trainer)

    @override
    def after_step(self, trainer: Any) -> None:
        for callback in self._each.values():
            callback.after_step(trainer)

    @override
    def on_metrics(self, trainer: Any, metrics: Mapping[str, Any]) -> None:
        for callback in self._each.values():
            callback.on_metrics(trainer, metrics)

    @override
    def on_evaluation(self, trainer: Any, figures: Mapping[str, float]) -> None:
        for callback in self._each.values():
            callback.on_evaluation(trainer, figures)

    @override
    def on_checkpoint(self, trainer: Any, written: Any) -> None:
        for callback in self._each.values():
            callback.on_checkpoint(trainer, written)

    @override
    def on_exception(self, trainer: Any, error: BaseException) -> None:
        for callback in self._each.values():
            try:
                callback.on_exception(trainer, error)
            except Exception:
                traceback.print_exc()

    @override
    def on_end(self, trainer: Any, result: Mapping[str, Any]) -> None:
        for callback in self._each.values():
            callback.on_end(trainer, result)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: state for name, callback in self._each.items() if (state := callback.state_dict())}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, callback in self._each.items():
            if name in state:
                callback.load_state_dict(state[name])


class _AfterStep(Callback):
    """A plain function."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function

    @override
    def after_step(self, trainer: Any) -> None:
        self._function(trainer)


def _build(item: cells.CallbackCell | Callable[..., Any], experiment: Experiment) -> Callback:
    match item:
        case Callback():
            return item
        case cells.EarlyStopping():
            return EarlyStop(item, experiment)
        case cells.BestCheckpoint():
            return KeepBest(item, experiment)
        case cells.Statistics():
            return TensorStatistics(item)
        case cells.SystemMeters():
            return SystemThread(item)
        case cells.Profile():
            return Profiler(item)
        case cells.CSV() | cells.TensorBoard() | cells.WandB() | cells.MLflow():
            from collie_lab.training.callbacks.sinks import build_sink

            return build_sink(item)
        case cells.CallbackCell():
            raise TypeError(f"no callback for the cell {type(item).__name__}")
    return _AfterStep(item)
