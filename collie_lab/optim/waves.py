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

from collie_lab.optim.slot import Ready

__all__ = ["Waiting", "waves"]

_Update = Callable[[list[Ready], int], None]

# Elements: from a tenth of a millisecond's work for the fastest GPU to what AdaLomo takes 130 MB of scratch for.
_FIRST_WAVE, _LAST_WAVE = 2**26, 2**29
# Bytes of gradients that may wait in any case.
_SMALL = 2**22


def waves(ready: list[Ready]) -> Iterator[list[Ready]]:
    """Parameters in portions: the device updates one of them while the host prepares the next, twice as large.

    Vectors and numbers come last: AdaLomo has kernels of their own for them, whose launches are worth it for many.
    """
    wave, size, limit = list[Ready](), 0, _FIRST_WAVE
    for each in sorted(ready, key=lambda each: len(each[1].shards.shape) < 2):
        wave.append(each)
        size += each[1].shards.shape.numel()  # of the whole: the same waves on every rank
        if size >= limit:
            yield wave
            wave, size, limit = [], 0, min(2 * limit, _LAST_WAVE)
    if wave:
        yield wave


class Waiting:
    """Gradients of a backward pass that wait for others to share a launch with.

    Together they never take more than the largest gradient alone, or 4 MB: they go before one comes that would be too
    much, which the order of the backward pass before tells. The end of the pass takes them all.
    """

    def __init__(self) -> None:
        self._ready: list[Ready] = []
        self._part = self._size = 0
        self._pass = -1  # autograd's number of the backward pass
        self._stream: Any = None
        self._largest = _SMALL
        self._last: Tensor | None = None
        self._next: Any = WeakIdKeyDictionary()  # of a parameter, the bytes of the gradient that came after it

    def add(self, each: Ready, part: int, update: _Update) -> None:
        """One more gradient: now, or soon, its parameter is updated. `part`: which of its gradients in this step."""
        parameter, _, gradient = each
        number, stream = torch._C._current_graph_task_id(), _stream(gradient)
        if number != self._pass or part != self._part:
            self.flush(update)
        if number == -1 or (self._ready and stream != self._stream):  # nobody calls back; others are of another stream
            update([each], part)
            return
        if number != self._pass:
            Variable._execution_engine.queue_callback(lambda: self._end(update))  # type: ignore[attr-defined]
        self._largest = max(self._largest, gradient.nbytes)
        if self._last is not None:
            self._next[self._last] = gradient.nbytes
        self._pass, self._part, self._last, self._stream = number, part, parameter, stream
        self._ready.append(each)
        self._size += gradient.nbytes
        if self._size + self._next.get(parameter, self._largest) > self._largest:
            self.flush(update)

    def flush(self, update: _Update) -> None:
        """Update all that wait. (After a pass that failed, some do: their gradients were complete.)"""
        ready = self._ready
        self.drop()
        if ready:
            update(ready, self._part)

    def drop(self) -> None:
        """Forget what waits."""
        self._ready, self._size = [], 0

    def _end(self, update: _Update) -> None:
        with torch.no_grad():
            self.flush(update)
        self._pass, self._last = -1, None


def _stream(tensor: Tensor) -> Any:
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
