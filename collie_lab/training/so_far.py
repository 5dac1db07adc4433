"""What a run knows of itself beside its weights: a checkpoint keeps it, for the figures of one that goes on from there
to be those of the whole."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from collie_lab.cells import Experiment
from collie_lab.training.identity import known_figures, setting, told_figures
from collie_lab.training.meters import Meters

__all__ = ["SoFar"]


class SoFar:
    """Figures, seconds and peak of a run, and of those that it goes on from.

    Attributes:
        figures: what evaluations have found, by the step of the weights, then by the evaluation's place.
    """

    def __init__(self, experiment: Experiment, device: torch.device):
        self.figures: dict[int, dict[int, dict[str, float]]] = {}
        self._experiment, self._device = experiment, device
        self._began, self._seconds_before, self._peak_before = time.perf_counter(), 0.0, 0

    @property
    def seconds(self) -> float:
        """From the start of the first to now, without the pauses between them."""
        return self._seconds_before + time.perf_counter() - self._began

    def peak_bytes(self, measured: int | None) -> int:
        """The most memory of this rank, of which this run has `measured` so much."""
        return max(self._peak_before, measured or 0)

    def state_dict(self, step: int, meters: Meters, peak_bytes: int) -> dict[str, Any]:
        """For the checkpoint of that step; `peak_bytes` of the worst rank."""
        return {"evaluated": told_figures(self._experiment, self.figures.get(step, {})),
                "meters": meters.state_dict(), "seconds": self.seconds,
                "setting": setting(self._experiment, self._device), "peak_bytes": peak_bytes}

    def load_state_dict(self, state: Mapping[str, Any], step: int, meters: Meters) -> None:
        """Go on from what the checkpoint of a step knows; speed and memory of another layout or device do not count."""
        self._seconds_before = state.get("seconds", 0.0)
        self.figures[step] = known_figures(self._experiment, state.get("evaluated", []))
        same = state.get("setting") == setting(self._experiment, self._device)
        self._peak_before = state["peak_bytes"] if same else 0
        meters.load_state_dict(state.get("meters", {}), speed=same)
