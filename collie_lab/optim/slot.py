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


@dataclass(slots=True, eq=False)
class Slot:
    """What an update needs of one parameter, found once; tensors are local pieces."""

    index: int
    """Its number among all parameters, frozen ones too: that of stochastic rounding's noise."""
    group: int
    shards: Shards
    counts: memoryview
    """Updates so far, and those of them before the last restart: the memory of the state's `step` and `start`."""
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
    counts = np.zeros(2, dtype=np.int64)  # a number of Python's is read and written ten times as fast as a tensor
    entries = {name: torch.from_numpy(count.reshape(()))
               for name, count in zip(("step", "start"), np.split(counts, 2), strict=True)}
    slot = Slot(index, group, shards, counts.data, states, None, rounding, engine, weight.dtype, weight.device)
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
