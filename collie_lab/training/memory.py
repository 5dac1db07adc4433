"""Peak memory: the allocator's own count on a GPU, live tensor bytes on a CPU."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["CpuMemory", "CudaMemory", "build_memory"]


class CudaMemory:
    """`torch.cuda.max_memory_allocated`, step by step and over the whole run. Costs nothing."""

    def __init__(self, device: torch.device):
        self._device = device
        self.peak_bytes: int | None = None
        self.step_bytes: int | None = None
        self.recorded = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one optimizer step."""
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self.step_bytes = torch.cuda.max_memory_allocated(self._device)
        self.peak_bytes = max(self.peak_bytes or 0, self.step_bytes)

    def close(self) -> None:
        """Nothing to close."""


# The name of a step among the profiler's events.
_MARK = "collie_lab step"


class CpuMemory:
    """Peak bytes of live tensors, from the allocator's events as torch's profiler reports them.

    The profiler records from before the model exists until the end of the second step, when all lasting
    state is there; what is live then is the base. As on a GPU, the peak is that of the steps: what making
    and sharding the model takes does not count. Later steps are recorded only where `probe` says so (the
    one with most tokens): a recorded step is slower, so its speed is not counted.
    """

    WARM_UP = 2

    def __init__(self) -> None:
        self.peak_bytes: int | None = None
        self.step_bytes: int | None = None
        self.recorded = True
        """Whether the last step was recorded, and so slowed down."""
        self._base = 0
        self._profiler: torch.profiler.profile | None = None
        self.probe: set[int] = set()
        gc.collect()  # garbage of an earlier run in this process, freed under way, would count against this one
        self._start()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one optimizer step, counted from 1 since the start of the process."""
        if step in self.probe and self._profiler is None:
            self._start()
        self.recorded = self._profiler is not None
        with torch.profiler.record_function(_MARK) if self.recorded else contextlib.nullcontext():
            yield
        if self._profiler is not None and step >= self.WARM_UP:
            self._stop()

    def close(self) -> None:
        """Stop recording, for a run that ends before its second step."""
        if self._profiler is not None:
            self._stop()

    def _start(self) -> None:
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()

    def _stop(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        events: Any = self._profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        began = min((event.start_ns() for event in events if event.name() == _MARK), default=0)
        live, peak = self._base, 0
        for event in events:
            if event.name() == "[memory]":
                live += event.nbytes()
                if event.start_ns() >= began:
                    peak = max(peak, live)
        # A later recording misses the freeing of what it did not see made: only the first sets the base.
        self._base = self._base or live
        self._profiler = None
        self.step_bytes = peak
        self.peak_bytes = max(self.peak_bytes or 0, peak)


def build_memory(device: torch.device) -> CudaMemory | CpuMemory:
    """The meter of a device."""
    return CudaMemory(device) if device.type == "cuda" else CpuMemory()
