"""From parameters whose gradients are there to what engines take, which is much the same in every step."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from collie_lab.optim.engine import Engine
from collie_lab.optim.rounding import Weight, noise_keys
from collie_lab.optim.rule import Gradient, Update
from collie_lab.optim.shards import local
from collie_lab.optim.slot import Ready, Slot

__all__ = ["Gatherer", "Updates"]


class Updates:
    """What some parameters bring to one update; they have all its numbers in common, and one engine.

    A collection of `Update`, made one by one when they are asked for; engines that take many at once look at the lists.

    Attributes:
        weights, gradients: local, dense tensors.
        noise: where the noise of stochastic rounding begins; 0 where there is none.
        scale, limit: what clips the gradients.
        kept: whatever the engine has found out of these tensors. The same in the next update, unless one of them has
            another place, shape or type by then; gradients may lie elsewhere.
    """

    def __init__(self, slots: tuple[Slot, ...], weights: Sequence[Tensor], gradients: Sequence[Tensor], *,
                 noise: list[int], scale: Tensor | None, limit: float | None, kept: dict[Hashable, Any]):
        self._slots, self.weights, self.gradients = slots, weights, gradients
        self.noise, self.scale, self.limit, self.kept = noise, scale, limit, kept

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, place: int) -> Update:
        slot = self._slots[place]
        return Update(Weight(self.weights[place], slot.rounding, slot.extra, self.noise[place]),
                      Gradient(self.gradients[place], self.scale, self.limit), slot.states, slot.shards)

    def __iter__(self) -> Iterator[Update]:
        return map(self.__getitem__, range(len(self)))


class Gatherer:
    """Gathers the updates of an optimizer, and keeps what engines find out of their tensors from step to step.

    Args:
        seed: of stochastic rounding.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._kept: dict[Slot, _Kept] = {}  # by the first of them

    def __call__(self, ready: list[Ready], *, part: int, scale: Tensor | None, limit: float | None
                 ) -> list[tuple[Engine, int, int, Updates]]:
        """Engine, group and step (from 1), with the updates that have them in common.

        Args:
            part: which of a parameter's gradients in this step it is; the first begins the step.
            scale, limit: what clips the gradients.

        Raises:
            ValueError: a sparse gradient.
            RuntimeError: a parameter that has changed its type or device.
        """
        together: dict[tuple[Engine, int, int], list[Ready]] = {}
        for each in ready:
            slot = each[1]
            steps, start = slot.counts.read()
            together.setdefault((slot.engine, slot.group, steps + (not part) - start), []).append(each)
        return [(*key, self._updates(some, part, scale, limit)) for key, some in together.items()]

    def _updates(self, ready: list[Ready], part: int, scale: Tensor | None, limit: float | None) -> Updates:
        parameters, slots, gradients = zip(*ready, strict=True)
        kept = self._kept.get(slots[0])
        if kept is None or kept.slots != slots:
            if sum(map(len, self._kept.values())) > _MOST:  # whose parameters differ from step to step
                self._kept.clear()
            kept = self._kept[slots[0]] = _Kept(parameters, slots)
        weights = [local(parameter) for parameter in parameters] if kept.is_sharded else parameters
        noise = self._noise(slots, part) if kept.is_noisy else [0] * len(slots)
        return Updates(slots, weights, gradients, noise=noise, scale=scale, limit=limit,
                       kept=kept.of(weights, gradients))

    def _noise(self, slots: tuple[Slot, ...], part: int) -> list[int]:
        # Every part of a gradient has noise of its own.
        steps = np.array([slot.counts.read()[0] + (not part) for slot in slots], dtype=np.uint64)
        numbers = np.array([slot.index for slot in slots], dtype=np.uint64)
        keys = noise_keys(self._seed + part, steps, numbers).tolist()
        return [key + slot.shards.offset for key, slot in zip(keys, slots, strict=True)]


# Parameters of which something is kept, at some 300 bytes each.
_MOST = 2**17
_Signature = tuple[list[int], list[torch.Size], list[torch.dtype], list[bool]]


class _Kept:
    """What is kept of the parameters of some slots, as long as all their tensors are what and where they were."""

    def __len__(self) -> int:
        return len(self.slots)

    def __init__(self, parameters: tuple[Tensor, ...], slots: tuple[Slot, ...]):
        self.slots = slots
        self.is_sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
        self.is_noisy = any(slot.rounding == "stochastic" for slot in slots)
        self._reads_addresses = slots[0].engine.keeps
        self._beside = [tensor for slot in slots for tensor in (slot.extra, *slot.states.values())
                        if tensor is not None]
        self._signature: _Signature | None = None
        self._found: dict[Hashable, Any] = {}

    def of(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[Hashable, Any]:
        """What was found of them; nothing where something has changed."""
        signature: _Signature | None = None
        if self._reads_addresses and all(each.is_contiguous() for each in gradients):
            tensors = [*weights, *self._beside]
            signature = ([tensor.data_ptr() for tensor in tensors], [tensor.shape for tensor in tensors],
                         [tensor.dtype for tensor in [*tensors, *gradients]],
                         [tensor.is_contiguous() for tensor in tensors])
        if signature is None or signature != self._signature:
            self._check(weights, gradients)
            self._found, self._signature = {}, signature
        return self._found

    def _check(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        for slot, weight, gradient in zip(self.slots, weights, gradients, strict=True):
            if gradient.is_sparse:
                raise ValueError("sparse gradients are not supported: Embedding(sparse=False)")
            if weight.dtype != slot.dtype or weight.device != slot.device:
                raise RuntimeError(
                    f"a parameter became {weight.dtype} on {weight.device} after the optimizer was made for "
                    f"{slot.dtype} on {slot.device}: change the model before")
