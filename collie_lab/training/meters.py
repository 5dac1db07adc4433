"""What is measured of every step, without making the device wait for the host.

A step's figures travel to the host while the next step is under way; they are read one step late, at the
same step on every rank, so that all ranks take the same decisions from them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collie_lab.folder import JsonLines, RunFolder

__all__ = ["Meters", "StepFigures"]

# Steps at the start whose speed says little: allocations, compilation, caches.
_WARM_UP = 2
# The reported training loss is the mean of so many last steps.
_LAST = 10


@dataclass(frozen=True)
class StepFigures:
    """The figures of one finished step, on the host."""

    step: int
    loss: float
    stop: bool
    asked: bool
    """Whether somebody waits for an answer of the model."""


@dataclass
class _Pending:
    step: int
    values: Tensor
    record: dict[str, Any]
    flops: float
    marks: tuple[Any, Any]


class Meters:
    """Collects steps, writes `metrics.jsonl` (rank 0), and sums up."""

    def __init__(self, folder: RunFolder | None, device: torch.device, world_size: int, peak_flops: float | None):
        self._device, self._world, self._peak = device, world_size, peak_flops
        self._lines = JsonLines(folder.path / "metrics.jsonl") if folder else None
        self._pending: list[_Pending] = []
        self._losses: list[float] = []
        self._speed: list[tuple[int, float]] = []  # tokens and seconds of the steps after the warm-up
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

    def pull(self, *, all_: bool = False) -> list[StepFigures]:
        """The figures of the steps that must be finished by now: all but the last, or all."""
        ready: list[StepFigures] = []
        late = 0 if all_ or self._device.type != "cuda" else 1
        while len(self._pending) > late:
            ready.append(self._finish(self._pending.pop(0)))
        return ready

    def _finish(self, step: _Pending) -> StepFigures:
        began, ended = step.marks
        if self._device.type == "cuda":
            ended.synchronize()
            seconds = began.elapsed_time(ended) / 1000
        else:
            seconds = ended - began
        loss, grad_norm, stop, asked, unclipped = step.values.tolist()
        self._seen += 1
        self._losses.append(loss)
        if self._seen > _WARM_UP:
            self._speed.append((step.record["tokens"], seconds))
        if self._lines:
            if math.isfinite(unclipped):
                step.record["unclipped_share"] = unclipped
            self._lines.append({**step.record, "loss": loss, "grad_norm": grad_norm,
                                "tokens_per_second": step.record["tokens"] / seconds,
                                "mfu": self._mfu(step.flops, seconds)})
        return StepFigures(step.step, loss, stop > 0, asked > 0)

    def _mfu(self, flops: float, seconds: float) -> float | None:
        return None if self._peak is None else flops / seconds / (self._peak * self._world)

    def summary(self) -> dict[str, float | None]:
        """Loss (mean of the last steps) and useful tokens per second over all ranks, warm-up left out."""
        last = [loss for loss in self._losses[-_LAST:] if math.isfinite(loss)]
        tokens, seconds = (sum(column) for column in zip(*self._speed, strict=True)) if self._speed else (0, 0)
        return {"loss": sum(last) / len(last) if last else None,
                "tokens_per_second": tokens / seconds if seconds else None}
