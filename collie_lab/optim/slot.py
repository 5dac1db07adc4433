"""What an optimizer keeps of one parameter, and which optimizer in backward a parameter belongs to."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from collie_lab.optim.engine import Engine
from collie_lab.optim.rounding import compute_dtype
from collie_lab.optim.rule import Rule, States
from collie_lab.optim.shards import Shards, local

__all__ = ["Ready", "Slot", "claim", "make_slot", "release"]

# Who makes another optimizer for the same parameters means that one, even where the old one is still held.
_hooks: Any = WeakIdKeyDictionary()


class Counts:
    """Updates of a parameter, and those of them before the last restart.

    Python reads and writes them ten times as fast as it could tensors, which have the same memory: `step` and `start`
    of the parameter in `Optimizer.state`.
    """

    __slots__ = ("_counts", "_place", "start", "step")

    def __init__(self) -> None:
        self._counts = np.zeros(2, dtype=np.int64).data
        self.step, self.start = self._tensors()
        self._place = self.step.data_ptr() if type(self.step) is Tensor else None  # those of a dry run lie nowhere

    def read(self) -> tuple[int, int]:
        """Both."""
        if self._place is not None and self._place != self.step.data_ptr():
            self._take_back()
        return self._counts[0], self._counts[1]

    def advance(self) -> None:
        """One more update."""
        self._counts[0] += 1

    def restart(self) -> None:
        """All updates so far were before a restart."""
        self._counts[1], _ = self.read()

    def _take_back(self) -> None:
        """Somebody has moved the optimizer's states (`state.data = ...`): counts stay with the host, as torch's do."""
        moved = self.step, self.start
        self._counts[0], self._counts[1] = map(int, moved)
        for tensor, ours in zip(moved, self._tensors(), strict=True):
            tensor.data = ours

    def _tensors(self) -> tuple[Tensor, Tensor]:
        step, start = np.split(np.asarray(self._counts), 2)
        return torch.from_numpy(step.reshape(())), torch.from_numpy(start.reshape(()))


@dataclass(slots=True, eq=False)
class Slot:
    """What an update needs of one parameter, found once; tensors are local pieces."""

    index: int
    """Its number among all parameters, frozen ones too: that of stochastic rounding's noise."""
    group: int
    shards: Shards
    counts: Counts
    states: States
    extra: Tensor | None
    rounding: str
    engine: Engine
    dtype: torch.dtype
    device: torch.device


Ready = tuple[Tensor, Slot, Tensor]
"""A parameter, what is kept of it, and its gradient."""


def make_slot(parameter: Tensor, rule: Rule, rounding: str, *, index: int, group: int, engine: Engine
              ) -> tuple[Slot, dict[str, Tensor]]:
    """The slot of a parameter and, of the same memory, its entries in `Optimizer.state`, laid out as the parameter.

    Raises:
        ValueError: a type of weights that cannot be trained.
    """
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"weights of type {parameter.dtype} cannot be trained: use float32 or bfloat16")
    shards, weight = Shards(parameter), local(parameter)
    rounding = rounding if weight.dtype == torch.bfloat16 else "exact"
    value = weight.to(compute_dtype(weight.dtype), memory_format=torch.contiguous_format)
    states = rule.init(value)
    counts = Counts()
    entries = {"step": counts.step, "start": counts.start}
    slot = Slot(index, group, shards, counts, states, None, rounding, engine, weight.dtype, weight.device)
    for name, piece in states.items():
        entries[name] = rule.layout(name, shards, piece)
    if rounding == "master":
        slot.extra = value  # a copy: the weight has another type
        entries["master"] = shards.like_parameter(value)
    elif rounding == "kahan":
        slot.extra = torch.zeros_like(value, dtype=weight.dtype)
        entries["compensation"] = shards.like_parameter(slot.extra)
    return slot, entries


def claim(parameter: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Call `hook`, a method, with the parameter whenever its gradient is complete, as long as its owner lives."""
    # Python's garbage collection does not look into a parameter's hooks: one that held its optimizer would keep both.
    method = weakref.WeakMethod(hook)

    def call(parameter: Tensor) -> None:
        if (living := method()) is not None:
            living(parameter)
        else:
            warnings.warn("an optimizer in backward is gone, and its parameters are no longer updated: keep it in a "
                          "variable as long as they are trained", stacklevel=2)

    _hooks[parameter] = parameter.register_post_accumulate_grad_hook(call)


def release(parameter: Tensor) -> None:
    """No optimizer in backward updates this parameter any longer."""
    if handle := _hooks.pop(parameter, None):
        handle.remove()
