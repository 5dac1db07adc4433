"""Sinks: where a run's figures go besides its folder. Rank 0 has a thread for each, and never waits for it."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from typing_extensions import override

from collie_lab import cells
from collie_lab.cells import Callback
from collie_lab.folder import RunFolder

__all__ = ["Opening", "Sink", "build_sink", "flat"]

#: Lines that a sink may be behind, and seconds that it gets to catch up at the end (fewer where an error waits).
_LONGEST: Final = 100_000
_PATIENCE: Final = 60.0
_PATIENCE_OF_ERRORS: Final = 10.0

Kind = Literal["train", "eval"]


@dataclass(frozen=True)
class Opening:
    """What a sink gets to know first."""

    folder: RunFolder
    run: str
    """The name under which it goes on: that of the first run, where runs were resumed."""
    step: int
    """Steps that were done before."""
    config: dict[str, Any]
    """The experiment, as YAML could hold it."""

    def place(self, folder: str | None, default: Path) -> Path:
        """The folder for this run's files: `default`, or one of its own in `folder`."""
        return default if folder is None else Path(folder).expanduser() / self.run


class Sink(Callback):
    """Takes in what a run tells, and hands it on in a thread: `open`, `write`, and `close` are called there.

    What they raise is told once, as a warning of the run, and ends the sink, not the run. The thread knows nothing of
    the trainer: one that hangs does not keep the model in memory.
    """

    name = "sink"

    def __init__(self) -> None:
        self._run = ""
        self._lines: queue.Queue[tuple[Kind, int, float, dict[str, float]] | None] = queue.Queue(_LONGEST)
        self._thread: threading.Thread | None = None
        self._result: Mapping[str, Any] | None = None
        self._failure = ""

    # --- in the sink's thread

    def open(self, opening: Opening) -> None:
        """Make ready. A run that goes on leaves out, or takes back, what it has told before and tells again."""
        raise NotImplementedError

    def write(self, kind: Kind, step: int, moment: float, figures: Mapping[str, float]) -> None:
        """Take the figures of a step (`train`) or of evaluations after it (`eval`); `moment` in seconds since 1970."""
        raise NotImplementedError

    def close(self, result: Mapping[str, Any] | None) -> None:
        """The end; without a result the run has failed."""
        raise NotImplementedError

    def _work(self, opening: Opening) -> None:
        try:
            self.open(opening)
            while (line := self._lines.get()) is not None:
                self.write(*line)
            self.close(self._result)
        except (Exception, SystemExit) as error:
            self._failure = f"{type(error).__name__}: {error}"

    # --- in the loop's

    @override
    def on_start(self, trainer: Any) -> None:
        self._run = self._run or trainer.folder.id
        if trainer.rank == 0:
            config = trainer.experiment.to_dict(lambda path, value: f"<{type(value).__name__} in memory>")
            opening = Opening(trainer.folder, self._run, trainer.step, config)
            self._thread = threading.Thread(target=self._work, args=(opening,), name=self.name, daemon=True)
            self._thread.start()

    @override
    def on_metrics(self, trainer: Any, metrics: Mapping[str, Any]) -> None:
        figures = {name: float(value) for name, value in metrics.items()
                   if name not in ("step", "time") and value is not None}
        self._put(trainer, "train", metrics["step"], metrics["time"], figures)

    @override
    def on_evaluation(self, trainer: Any, figures: Mapping[str, float]) -> None:
        self._put(trainer, "eval", trainer.step, time.time(), dict(figures))

    @override
    def on_end(self, trainer: Any, result: Mapping[str, Any]) -> None:
        self._result = result
        self._leave(trainer, _PATIENCE)

    @override
    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self._leave(trainer, _PATIENCE_OF_ERRORS)

    def _put(self, trainer: Any, kind: Kind, step: int, moment: float, figures: dict[str, float]) -> None:
        if self._thread is not None and not self._failure:
            try:
                self._lines.put_nowait((kind, step, moment, figures))
            except queue.Full:
                self._failure = f"it is {_LONGEST:,} lines behind"
        self._tell_failure(trainer)

    def _leave(self, trainer: Any, patience: float) -> None:
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=patience)
            self._thread.join(patience)
            if self._thread.is_alive():
                self._failure = f"it did not end within {patience:g} s"
        self._tell_failure(trainer)

    def _tell_failure(self, trainer: Any) -> None:
        if self._thread is not None and self._failure:
            self._thread = None
            trainer.event("warning", text=f"{self.name} gets no more figures: {self._failure}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"run": self._run}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._run = state["run"]


def flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their path, `optimizer.lr`."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def build_sink(cell: cells.CallbackCell) -> Sink:
    """The sink of a cell."""
    from collie_lab.training.callbacks import services, tables

    match cell:
        case cells.CSV():
            return tables.Tables(cell)
        case cells.TensorBoard():
            return services.TensorBoardSink(cell)
        case cells.WandB():
            return services.WandBSink(cell)
        case cells.MLflow():
            return services.MLflowSink(cell)
    raise TypeError(f"no sink for the cell {type(cell).__name__}")
