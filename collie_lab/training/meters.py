"""What is measured of every step, without making the device wait for the host.

A step's figures travel to the host while the next step is under way; they are read one step late, at the
same step on every rank, so that all ranks take the same decisions from them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from collie_lab.folder import JsonLines, RunFolder

__all__ = ["Meters", "StepFigures"]

# Steps at the start whose speed says little: allocations, compilation, caches.
_WARM_UP = 2
# The reported training loss is the mean of so many last steps.
_LAST = 10

_COLUMNS = {"step", "time", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "memory_allocated",
            "unclipped_share"}


@dataclass(frozen=True)
class StepFigures:
    """The figures of one finished step, on the host."""

    step: int
    loss: float
    stop: bool
    asked: bool
    """Whether somebody waits for an answer of the model."""
    record: dict[str, Any]
    """All figures, as they stand in `metrics.jsonl`."""


class _Logged:
    """Figures of a callback on their way to the host."""

    def __init__(self, figures: Mapping[str, float | Tensor]):
        self._figures: dict[str, float | Tensor] = {}
        self._ready: torch.cuda.Event | None = None
        for name, value in figures.items():
            if isinstance(value, Tensor):  # on a GPU: others are numbers by now
                value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
                self._ready = torch.cuda.Event()
            self._figures[name] = value
        if self._ready is not None:
            self._ready.record()

    def read(self) -> dict[str, float]:
        if self._ready is not None:
            self._ready.synchronize()
        return {name: float(value) for name, value in self._figures.items()}


@dataclass
class _Pending:
    step: int
    values: Tensor
    record: dict[str, Any]
    flops: float
    marks: tuple[Any, Any]
    logged: _Logged | None = None


class Meters:
    """Collects steps, writes `metrics.jsonl` (rank 0), and sums up."""

    def __init__(self, folder: RunFolder | None, device: torch.device, world_size: int, peak_flops: float | None):
        self._device, self._world, self._peak = device, world_size, peak_flops
        self._lines = JsonLines(folder.path / "metrics.jsonl") if folder else None
        self._pending: list[_Pending] = []
        self._logged: dict[str, float | Tensor] = {}
        self._losses: list[float] = []
        self._tokens, self._seconds = 0, 0.0  # of the steps after the warm-up
        self._seen = 0

    def mark(self) -> Any:
        """A point in time on the device: a CUDA event, or seconds."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def push(self, step: int, values: Tensor, *, lr: float, tokens: int, flops: float, memory: int | None,
             began: Any) -> None:
        """Take one step in. `values` [5], still on the device: loss, gradient norm, stop wish, question, unclipped
        share. What there is not in a step is NaN.
        """
        if self._device.type == "cuda":
            host = torch.empty(5, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
        record = {"step": step, "time": time.time(), "lr": lr, "tokens": tokens, "memory_allocated": memory}
        self._pending.append(_Pending(step, values, record, flops, (began, self.mark())))

    def log(self, figures: Mapping[str, float | Tensor]) -> None:
        """Add figures (numbers, 0-d tensors) to the record of the step at hand.

        Raises:
            ValueError: a name that a record has anyway.
        """
        if taken := _COLUMNS & figures.keys():
            raise ValueError(f"{min(taken)!r} is a column of its own: log it under another name")
        for name, value in figures.items():
            if isinstance(value, DTensor):  # of sharded weights: known when all ranks have added their part
                value = value.full_tensor()
            value = value.detach() if isinstance(value, Tensor) else value
            self._logged[name] = value.reshape(()) if isinstance(value, Tensor) and value.is_cuda else float(value)

    def pull(self, *, all_: bool = False) -> list[StepFigures]:
        """The figures of the steps that must be finished by now: all but the last, or all."""
        ready: list[StepFigures] = []
        if self._logged and self._pending:
            self._pending[-1].logged, self._logged = _Logged(self._logged), {}
        late = 0 if all_ or self._device.type != "cuda" else 1
        while len(self._pending) > late:
            ready.append(self._finish(self._pending.pop(0)))
        return ready

    def _finish(self, step: _Pending) -> StepFigures:
        seconds = self._wait(step)
        loss, grad_norm, stop, asked, unclipped = step.values.tolist()
        self._seen += 1
        self._losses.append(loss)
        if self._seen > _WARM_UP:
            self._tokens += step.record["tokens"]
            self._seconds += seconds
        record = {**step.record, "loss": loss, "grad_norm": grad_norm,
                  "tokens_per_second": step.record["tokens"] / seconds, "mfu": self._mfu(step.flops, seconds)}
        if math.isfinite(unclipped):
            record["unclipped_share"] = unclipped
        if step.logged is not None:
            record |= step.logged.read()
        if self._lines:
            self._lines.append(record)
        return StepFigures(step.step, loss, stop > 0, asked > 0, record)

    def _wait(self, step: _Pending) -> float:
        """Until a step is over; the seconds that it took."""
        began, ended = step.marks
        if self._device.type != "cuda":
            return float(ended - began)
        ended.synchronize()
        return float(began.elapsed_time(ended) / 1000)

    def _mfu(self, flops: float, seconds: float) -> float | None:
        return None if self._peak is None else flops / seconds / (self._peak * self._world)

    def summary(self) -> dict[str, float | None]:
        """Loss (mean of the last steps) and useful tokens per second over all ranks, warm-up left out."""
        last = [loss for loss in self._losses[-_LAST:] if math.isfinite(loss)]
        return {"loss": sum(last) / len(last) if last else None,
                "tokens_per_second": self._tokens / self._seconds if self._seconds else None}

    def state_dict(self) -> dict[str, Any]:
        """What `summary` is made of, for a run that goes on; waits for the device."""
        losses, tokens, seconds = [*self._losses], self._tokens, self._seconds
        for number, step in enumerate(self._pending, self._seen + 1):
            took = self._wait(step)
            losses.append(float(step.values[0]))
            if number > _WARM_UP:
                tokens, seconds = tokens + step.record["tokens"], seconds + took
        return {"losses": losses[-_LAST:], "tokens": tokens, "seconds": seconds}

    def load_state_dict(self, state: Mapping[str, Any], *, speed: bool) -> None:
        """Sum up from there on, with or without the speed; the first steps here are a warm-up again."""
        self._losses = list(state.get("losses", []))
        if speed:
            self._tokens, self._seconds = state.get("tokens", 0), state.get("seconds", 0.0)
