"""From parameters whose gradients are there to what engines take."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from collie_lab.optim.engine import Engine
from collie_lab.optim.rounding import Weight, noise_keys
from collie_lab.optim.rule import Gradient, Update
from collie_lab.optim.shards import local
from collie_lab.optim.slot import Ready

__all__ = ["gather"]


def gather(ready: list[Ready], *, part: int, seed: int, scale: Tensor | None, limit: float | None
           ) -> dict[tuple[Engine, int, int], list[Update]]:
    """The updates of some parameters, by engine, group and step: those of one key have all numbers in common.

    Args:
        part: which of a parameter's gradients in this step it is; the first begins the step.
        seed: of stochastic rounding.
        scale, limit: what clips the gradients.

    Raises:
        ValueError: a sparse gradient.
        RuntimeError: a parameter that has changed its type or device.
    """
    slots = [slot for _, slot, _ in ready]
    steps = [int(slot.step) + (not part) for slot in slots]
    noise = [0] * len(slots)
    if any(slot.rounding == "stochastic" for slot in slots):  # every part of a gradient has noise of its own
        noise = noise_keys(seed + part, np.array(steps, dtype=np.uint64),
                           np.array([slot.index for slot in slots], dtype=np.uint64)).tolist()
    together: dict[tuple[Engine, int, int], list[Update]] = {}
    for (parameter, slot, gradient), step, key in zip(ready, steps, noise, strict=True):
        if gradient.is_sparse:
            raise ValueError("sparse gradients are not supported: Embedding(sparse=False)")
        weight = local(parameter)
        if weight.dtype != slot.dtype or weight.device != slot.device:
            raise RuntimeError(f"a parameter became {weight.dtype} on {weight.device} after the optimizer was made for "
                               f"{slot.dtype} on {slot.device}: change the model before")
        together.setdefault((slot.engine, slot.group, step - int(slot.start)), []).append(Update(
            Weight(weight, slot.rounding, slot.extra, key + slot.shards.offset), Gradient(gradient, scale, limit),
            slot.states, slot.shards))
    return together
