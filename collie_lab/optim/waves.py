"""How many parameters an engine updates at once, where it has one launch for many.

A launch costs the host as much as a GPU takes for 20 to 100 MB, so many parameters share one. But not all: after a
backward pass the device should begin at once, and inside it gradients that wait take memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.weak import WeakIdKeyDictionary

from collie_lab.optim.slot import Slot

__all__ = ["Ready", "Waiting", "waves"]

Ready = tuple[Tensor, Slot, Tensor]
"""A parameter, what is kept of it, and its gradient."""

# Elements: from a tenth of a millisecond's work for the fastest GPU to what AdaLomo takes 130 MB of scratch for.
_FIRST_WAVE, _LAST_WAVE = 2**26, 2**29
# Bytes of gradients that may wait in any case.
_SMALL = 2**22


def waves(ready: list[Ready]) -> Iterator[list[Ready]]:
    """Parameters in portions: the device updates one of them while the host prepares the next, twice as large."""
    wave, size, limit = list[Ready](), 0, _FIRST_WAVE
    for each in ready:
        wave.append(each)
        size += each[2].numel()
        if size >= limit:
            yield wave
            wave, size, limit = [], 0, min(2 * limit, _LAST_WAVE)
    if wave:
        yield wave


class Waiting:
    """Gradients of a backward pass that wait for others to share a launch with.

    Together they never take more than the largest gradient alone: they go before one comes that would be too much,
    which the order of the backward pass before tells. The end of the pass takes them all.
    """

    def __init__(self, update: Callable[[list[Ready], int], None]):
        self._update = update
        self._ready: list[Ready] = []
        self._part = self._size = 0
        self._pass = -1  # autograd's number of the backward pass
        self._largest = _SMALL
        self._last: Tensor | None = None
        self._next: Any = WeakIdKeyDictionary()  # of a parameter, the bytes of the gradient that came after it

    def add(self, each: Ready, part: int) -> None:
        """One more gradient: now, or soon, its parameter is updated. `part`: which of its gradients in this step."""
        parameter, _, gradient = each
        number = torch._C._current_graph_task_id()
        if number != self._pass or part != self._part:
            self.flush()
        if number != self._pass and number != -1:
            Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]
        self._largest = max(self._largest, gradient.nbytes)
        if self._last is not None:
            self._next[self._last] = gradient.nbytes
        self._pass, self._part, self._last = number, part, parameter
        self._ready.append(each)
        self._size += gradient.nbytes
        if number == -1 or self._size + self._next.get(parameter, self._largest) > self._largest:
            self.flush()

    def flush(self) -> None:
        """Update all that wait."""
        ready, self._ready, self._size = self._ready, [], 0
        if ready:
            self._update(ready, self._part)

    def _end(self) -> None:
        with torch.no_grad():
            self.flush()
        self._pass, self._last = -1, None
