"""Cutting a causal LM of transformers into pipeline stages, in place.

A stage is the whole model object with holes: what another rank holds is a module without parameters at the same place,
so that the names of the parameters that remain are those of the whole model, and its own `forward` still runs.

Shapes: B batch, T tokens of a row, C hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from typing_extensions import override

__all__ = ["Blank", "HeadElsewhere", "Parts", "Skip", "TiedCopy", "balance", "cut"]


def balance(costs: Sequence[int], first_cost: int, last_cost: int, runs: int) -> list[range]:
    """Consecutive layers in so many runs, each of at least one layer, the dearest as cheap as can be.

    `first_cost` comes to the first run (the embedding) and `last_cost` to the last (the head). Among equals, runs of
    like cost; the same everywhere, as it depends on the numbers alone.

    Raises:
        ValueError: fewer layers than runs.
    """
    count = len(costs)
    if count < runs:
        raise ValueError(f"{count} layers cannot be cut into {runs} pipeline stages")
    total = [0, *itertools.accumulate(costs)]

    def cost(begin: int, end: int) -> int:
        return total[end] - total[begin] + first_cost * (begin == 0) + last_cost * (end == count)

    # best[end]: dearest run, sum of squares and bounds of the first `end` layers in the runs so far.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, (0,))}
    for run in range(1, runs + 1):
        ends = range(run, count - (runs - run) + 1)
        best = {end: min((max(dearest, cost(begin, end)), squares + cost(begin, end) ** 2, (*bounds, end))
                         for begin, (dearest, squares, bounds) in best.items() if begin < end) for end in ends}
    return [range(begin, end) for begin, end in itertools.pairwise(best[count][2])]


@dataclass(frozen=True)
class Parts:
    """Where a model keeps what a pipeline moves. Names are those of the base model's children."""

    base: nn.Module
    layers: nn.ModuleList
    before: tuple[str, ...]
    """Modules before the layers; the first embeds the tokens."""
    after: tuple[str, ...]
    head: str
    """Name of the model's child that makes the logits."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Parts:
        """The parts, from the pipeline plan that transformers ships with the family.

        Raises:
            ValueError: the family has no plan, or parameters that it does not tell of.
        """
        family, base = model.config.model_type, model.base_model
        plan = list(getattr(base.config, "base_model_pp_plan", None) or ())
        if "layers" not in plan or not isinstance(getattr(base, "layers", None), nn.ModuleList):
            raise ValueError(f"transformers has no pipeline plan for the family {family!r}: use pp=1")
        middle = plan.index("layers")
        head = next((name for name, child in model.named_children() if child is model.get_output_embeddings()), None)
        known = {id(base), *(id(getattr(base, name)) for name in plan)}
        children = [*model.named_children(), *base.named_children()]
        strange = [name for name, child in children
                   if id(child) not in known and name != head and any(True for _ in child.parameters())]
        if head is None or strange:
            raise ValueError(f"{family!r} has parameters that its pipeline plan does not place "
                             f"({', '.join(strange) or 'its output head'}): use pp=1")
        return cls(base, base.layers, tuple(plan[:middle]), tuple(plan[middle + 1 :]), head)

    def runs(self, model: nn.Module, count: int) -> list[range]:
        """The layers of each of `count` runs, balanced by parameters."""
        costs = [_size(layer) for layer in self.layers]
        first = sum(_size(getattr(self.base, name)) for name in self.before)
        last = sum(_size(getattr(self.base, name)) for name in self.after) + _size(getattr(model, self.head))
        return balance(costs, first, last, count)


def cut(model: PreTrainedModel, parts: Parts, *, first: bool, last: bool, dtype: torch.dtype,
        fetch_logits: Callable[[tuple[int, ...]], Tensor]) -> TiedCopy | None:
    """Take from the model what lies before its layers unless `first`, and what lies after them unless `last`.

    Layers are not touched. A tied embedding stays where the head is, under its name; it is returned where it is a copy
    of that on the first stage. `fetch_logits` gives the logits of a shape where the head is elsewhere.
    """
    embedding: Any = getattr(parts.base, parts.before[0])
    head: Any = getattr(model, parts.head)
    tied = head.weight is embedding.weight
    copy = None
    if not first:
        width = embedding.weight.shape[1]
        blank: nn.Module = Blank(width, dtype)
        if tied and last:
            blank = copy = TiedCopy(embedding.weight, dtype)
        setattr(parts.base, parts.before[0], blank)
        _empty(parts.base, parts.before[1:])
    if not last:
        _empty(parts.base, parts.after)
        setattr(model, parts.head, HeadElsewhere(head.weight.shape[0], fetch_logits))
    return copy


class Skip(nn.Module):
    """A layer that does not run here: gives its hidden states [B, T, C] to `hand_on` and returns what that returns."""

    def __init__(self, layer: nn.Module, place: int, hand_on: Callable[[int, Tensor], Tensor]):
        super().__init__()
        # Some models ask a layer what it is, e.g. which mask it wants.
        for name, value in vars(layer).items():
            if not name.startswith("_") and isinstance(value, str | int | float):
                setattr(self, name, value)
        self._place, self._hand_on = place, hand_on

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                _count_tokens(value, self._place, hidden)
        return self._hand_on(self._place, hidden)


class Blank(nn.Module):
    """In the place of an embedding: zeros [B, T, C] without memory, which the first layers of a stage never see."""

    def __init__(self, width: int, dtype: torch.dtype):
        nn.Module.__init__(self)
        self._width, self._dtype = width, dtype

    @override
    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros((), dtype=self._dtype, device=ids.device).expand(*ids.shape, self._width)


class TiedCopy(Blank, nn.Embedding):
    """The weight of an embedding [V, C] that serves as output head on another stage than the one that embeds.

    An embedding still, for those who treat its weight as one (it does not decay).
    """

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype):
        Blank.__init__(self, weight.shape[1], dtype)
        self.weight = weight


class HeadElsewhere(nn.Module):
    """In the place of the output head: the logits [B, T, V] come from the stage that has it."""

    weight = bias = None

    def __init__(self, vocabulary: int, fetch: Callable[[tuple[int, ...]], Tensor]):
        super().__init__()
        self._vocabulary, self._fetch = vocabulary, fetch

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        return self._fetch((*hidden.shape[:-1], self._vocabulary))


def _count_tokens(cache: Cache, place: int, hidden: Tensor) -> None:
    """Have a layer's cache look as if it had run: positions and masks of the next token come from any of them."""
    layer: Any = cache.layers[place] if place < len(cache.layers) else None
    if hasattr(layer, "has_previous_state"):  # linear attention: a state, no tokens
        layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
    else:
        token = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        cache.update(token, token, place)


def _empty(base: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(base, name, nn.Identity())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
