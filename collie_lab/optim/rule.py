"""What an update rule is: formulas on tensors, without state, devices or layouts of its own.

A rule says what it remembers of a parameter (`init`), which numbers an update takes (`scalars`) and what the
update is (`update`). `RuleOptimizer` owns everything else: parameter groups, steps, clipping, the type in
which weights are kept, shards, and when an update happens. An engine decides how it is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collie_lab.optim.engine import Engine
    from collie_lab.optim.rounding import Weight
    from collie_lab.optim.shards import Shards
    from collie_lab.optim.updates import Updates

__all__ = ["Gradient", "Group", "Rule", "Scalars", "States", "Update"]

Group = Mapping[str, Any]
"""A parameter group: the hyper-parameters that a rule reads."""
Scalars = dict[str, Any]
"""Numbers of one update by name: floats, or 0-d tensors where a compiler needs them."""
States = dict[str, Tensor]
"""What a rule remembers of one parameter, by name; always in the type of the computation."""


class Gradient(NamedTuple):
    """One gradient as it came, and what clipping does to it when it is read.

    Attributes:
        raw: in its own type, the local piece of a sharded one.
        scale: 0-d, multiplies it; None: 1.
        limit: then every element is cut to ±limit; None: no limit.
    """

    raw: Tensor
    scale: Tensor | None = None
    limit: float | None = None

    def read(self, dtype: torch.dtype) -> Tensor:
        """The clipped gradient in the type of the computation."""
        return clip(self.raw.to(dtype), self.scale, self.limit)

    def on(self, raw: Tensor) -> Gradient:
        """The same clipping of another piece."""
        return Gradient(raw, self.scale, self.limit)


def clip(gradient: Tensor, scale: Tensor | None, limit: float | None) -> Tensor:
    """Scaled first, then cut to ±limit."""
    if scale is not None:
        gradient = gradient * scale
    return gradient if limit is None else gradient.clamp(-limit, limit)


class Update(NamedTuple):
    """What one parameter brings to its update: local, dense tensors."""

    weight: Weight
    gradient: Gradient
    states: States
    shards: Shards


class Rule(ABC):
    """An update rule whose update treats every element alike; see `AdaLomo` for one that does not.

    Frozen and hashable, so that compiled code can be kept by rule. Constructor arguments may choose between
    formulas; numbers live in the parameter groups.
    """

    hyper: ClassVar[tuple[str, ...]] = ()
    """The hyper-parameters it reads from a group, besides `lr` and `weight_decay`."""
    linear: ClassVar[bool] = False
    """Whether updates with the parts of a gradient, one after the other, add up to the update with their sum."""
    rounding: ClassVar[str] = "master"
    """How bf16 weights are kept unless one says otherwise."""

    @abstractmethod
    def init(self, weight: Tensor) -> States:
        """The states of a parameter before its first update; `weight` has the type of the computation."""

    @abstractmethod
    def scalars(self, group: Group, step: int) -> Scalars:
        """The numbers of update `step` (from 1), in double precision.

        All arithmetic between numbers belongs here: `update` takes them in the type of the weights, where
        1 − 0.999 has lost three digits.
        """

    @abstractmethod
    def update(self, weight: Tensor, gradient: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
        """The new weight and the new states, as pure functions of the old, element by element.

        Only operators, and the torch functions named in `collie_lab.optim.trace`.
        """

    def apply(self, engine: Engine, updates: Updates, group: Group, step: int) -> None:
        """Update `step` of parameters of one group, in place; rules that look at a whole tensor at once override it.

        They give `updates` on to an engine as they got them, or go through them one by one.
        """
        engine.elementwise_all(self, updates, self.scalars(group, step))

    def layout(self, name: str, shards: Shards, state: Tensor) -> Tensor:
        """A local state as a tensor that knows its place in the whole: laid out as its parameter."""
        return shards.like_parameter(state)


def decay(group: Group) -> float:
    """The factor of decoupled weight decay, 1 − ηλ (arXiv 1711.05101)."""
    return 1.0 - float(group["lr"]) * float(group["weight_decay"])
