"""What watches one figure of the evaluations. They see the same figures on every rank, and so decide alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from collie_lab.cells import BestCheckpoint, Callback, EarlyStopping, Experiment, Monitor
from collie_lab.folder import Board

__all__ = ["EarlyStop", "KeepBest"]


class _Watch(Callback):
    """Reads the figure, and tells where there was none to read in the whole run."""

    def __init__(self, cell: Monitor, experiment: Experiment):
        self._monitor = cell.monitor
        # `check` refuses what gives no direction.
        self._sign = -1.0 if cell.direction(experiment.evaluate) == "max" else 1.0
        self._seen = False

    @override
    def on_evaluation(self, trainer: Any, figures: Mapping[str, float]) -> None:
        if self._monitor in figures:
            self._seen = True
            self._take(trainer, figures[self._monitor])

    def _take(self, trainer: Any, value: float) -> None:
        raise NotImplementedError

    @override
    def on_end(self, trainer: Any, result: Mapping[str, Any]) -> None:
        if not self._seen and result["status"] == "ok":
            trainer.event("warning", text=f"no evaluation has given {self._monitor!r}, which a callback was to monitor")


class EarlyStop(_Watch):
    """Patience with a figure that no longer improves; what is no number is no improvement."""

    def __init__(self, cell: EarlyStopping, experiment: Experiment):
        super().__init__(cell, experiment)
        self._patience, self._min_delta = cell.patience, cell.min_delta
        self._best: float | None = None
        self._best_step = self._waited = 0

    def _take(self, trainer: Any, value: float) -> None:
        if value == value and (self._best is None or self._sign * (self._best - value) > self._min_delta):
            self._best, self._best_step, self._waited = value, trainer.step, 0
            return
        self._waited += 1
        if self._waited >= self._patience:
            since = "was no number" if self._best is None else \
                f"has not improved on {self._best:.4g} (step {self._best_step})"
            trainer.finish(f"early stopping after step {trainer.step}: {self._monitor} {since} "
                           f"for {self._waited} evaluations")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._best_step, self._waited = state["best"], state["best_step"], state["waited"]


class KeepBest(_Watch):
    """The board of the best checkpoints: what is on it is kept by the checkpointer."""

    def __init__(self, cell: BestCheckpoint, experiment: Experiment):
        super().__init__(cell, experiment)
        self._keep, self._restore = cell.keep, cell.restore
        self._board: Board = []

    def _take(self, trainer: Any, value: float) -> None:
        if value != value:
            return
        entry = {"step": trainer.step, "value": value, "path": f"step-{trainer.step:06d}"}
        # Of equals the earlier one stays first.
        board = sorted([*self._board, entry], key=lambda each: self._sign * each["value"])[: self._keep]
        if entry in board:
            self._board = board
            trainer.keep_best(self._monitor, board, restore=self._restore)

    @override
    def on_start(self, trainer: Any) -> None:
        """Those of the run that is resumed count; they stay where they are."""
        for entry in self._board:
            path = trainer.resumed_from.parent / entry["path"]  # what is absolute stays so
            entry["path"] = path.name if path.parent == trainer.folder.checkpoints else str(path)
        if self._board:
            trainer.keep_best(self._monitor, self._board, take=False, restore=self._restore)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"board": self._board}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._board = [dict(entry) for entry in state["board"]]
