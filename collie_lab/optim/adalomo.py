"""AdaLomo: low-memory optimization with adaptive learning rate (Lv et al., arXiv 2310.10195, algorithm 1)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from collie_lab.optim.rule import Gradient, Group, Rule, Scalars, States
from collie_lab.optim.shards import Shards

if TYPE_CHECKING:
    from collie_lab.optim.engine import Engine
    from collie_lab.optim.rounding import Weight
    from collie_lab.optim.updates import Updates

__all__ = ["AdaLomo"]

_TINY = 1e-30
_Piece = tuple[tuple[int, ...], "Weight", Gradient]


@dataclass(frozen=True)
class AdaLomo(Rule):
    """The second moment as a product of its row and column means (Shazeer & Stern, arXiv 1804.04235), no momentum.

    With q = g² + 1e-30 and β = 1 − t^−0.8: r, c ← averages of the row and column means of q;
    u = g / √(r cᵀ / mean r); u ← u / max(1, RMS u); α = η·max(1e-3, RMS θ); θ ← θ(1 − αλ) − αu.
    A matrix of the last two dimensions has its own r and c, both RMS are of the whole tensor; below two
    dimensions q itself is averaged. Means and RMS are those of the whole parameter, however it is sharded.

    mean r = mean c at all times, for both are the mean of all q: so one sum over row shards gives c and, with
    it, the mean of r.
    """

    rounding: ClassVar[str] = "stochastic"

    @override
    def init(self, weight: Tensor) -> States:
        if weight.ndim < 2:
            return {"v": torch.zeros_like(weight)}
        # From shapes, for a rank's piece may be empty.
        return {"row": weight.new_zeros(weight.shape[:-1]),
                "column": weight.new_zeros((*weight.shape[:-2], weight.shape[-1]))}

    @override
    def scalars(self, group: Group, step: int) -> Scalars:
        return {"lr": group["lr"], "weight_decay": group["weight_decay"], "beta": 1 - step**-0.8}

    @override
    def update(self, weight: Tensor, gradient: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
        """The last pass: by now `shrink` (1 − αλ), `row` and `column` (factors of u, α among them) are known."""
        return weight * states["shrink"] - gradient * states["row"] * states["column"], {}

    @override
    def apply(self, engine: Engine, updates: Updates, group: Group, step: int) -> None:
        scalars = self.scalars(group, step)
        for weight, gradient, states, shards in engine.factored(self, _VECTOR, updates, scalars):
            if len(shards.shape) < 2:
                _apply_vector(weight, gradient, states, scalars, shards)
            else:
                _apply_matrices(self, engine, weight, gradient, states, scalars, shards)

    @override
    def layout(self, name: str, shards: Shards, state: Tensor) -> Tensor:
        ndim = len(shards.shape)
        if name == "row":
            return shards.without(ndim - 1, state)
        if name == "column":
            return shards.without(ndim - 2, state)
        return shards.like_parameter(state)


@dataclass(frozen=True)
class _Vector:
    """The last pass of a vector: `v`, `shrink` and `size`, α / max(1, RMS u), are known."""

    def update(self, weight: Tensor, gradient: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
        return weight * states["shrink"] - gradient / torch.sqrt(states["v"]) * states["size"], {}


_VECTOR = _Vector()


def _step_sizes(weight_square: Tensor, u_square: Tensor, scalars: Scalars, count: int) -> tuple[Tensor, Tensor]:
    """α / max(1, RMS u) and 1 − αλ, from the sums of squares over the whole tensor."""
    alpha = (weight_square / count).sqrt().clamp(min=1e-3) * scalars["lr"]
    return alpha / (u_square / count).sqrt().clamp(min=1), 1 - alpha * scalars["weight_decay"]


def _apply_vector(weight: Weight, gradient: Gradient, states: States, scalars: Scalars, shards: Shards) -> None:
    """Vectors and numbers are small: plain tensor operations."""
    g = gradient.read(weight.dtype)
    value, v = weight.read(), states["v"]
    v.mul_(scalars["beta"]).add_(g * g + _TINY, alpha=1 - scalars["beta"])
    u = g * v.rsqrt()
    sums = shards.sum(torch.stack([value.square().sum(), u.square().sum()]))
    size, shrink = _step_sizes(sums[0], sums[1], scalars, max(1, shards.shape.numel()))
    weight.write(value * shrink - u * size)


def _apply_matrices(rule: AdaLomo, engine: Engine, weight: Weight, gradient: Gradient, states: States,
                    scalars: Scalars, shards: Shards) -> None:
    """Three passes over the gradient: moments, the norm of u, the update."""
    *_, m, n = shards.shape
    row, column, pieces = states["row"], states["column"], _matrices(weight, gradient)
    row_sums, column_sums, weight_square = _moments(engine, pieces, row, column, shards)
    row.lerp_(row_sums.div_(n).add_(_TINY), 1 - scalars["beta"])
    column.lerp_(column_sums.div_(m).add_(_TINY), 1 - scalars["beta"])
    mean = shards.sum(column.sum(-1, keepdim=True), len(shards.shape) - 1).div_(n)
    row_factor, column_factor = row.rsqrt(), (column / mean).rsqrt_()
    energies = [engine.energy(g, row_factor[index], column_factor[index], row.dtype) for index, _, g in pieces]
    size, shrink = _step_sizes(weight_square, shards.sum(_added(energies, row)), scalars, shards.shape.numel())
    row_factor *= size
    for index, w, g in pieces:
        factors = {"row": row_factor[index][:, None], "column": column_factor[index][None, :], "shrink": shrink}
        engine.elementwise(rule, w, g, factors, {})


def _moments(engine: Engine, pieces: list[_Piece], row: Tensor, column: Tensor, shards: Shards
             ) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of g² along rows and columns, laid out as the states, and the sum of θ²; over all shards."""
    parts = [engine.moments(w, g) for _, w, g in pieces]
    row_sums, column_sums = (torch.cat([part[side] for part in parts] or [like.flatten()]).view_as(like)
                             for side, like in ((0, row), (1, column)))
    weight_square = _added([part[2] for part in parts], row)
    if shards.dims:
        first, second = len(shards.shape) - 2, len(shards.shape) - 1  # the dimensions of rows and columns
        shards.sum(row_sums, second)
        if first in shards.dims:  # one message for both
            both = shards.sum(torch.cat([column_sums.flatten(), weight_square[None]]), first)
            column_sums, weight_square = both[:-1].view_as(column), both[-1]
        shards.sum(weight_square, *[dim for dim in range(second + 1) if dim != first])
    return row_sums, column_sums, weight_square


def _matrices(weight: Weight, gradient: Gradient) -> list[_Piece]:
    """The matrices of the last two dimensions, with their indices."""
    if weight.tensor.ndim == 2:
        return [((), weight, gradient)]
    indices = itertools.product(*[range(size) for size in weight.tensor.shape[:-2]])
    return [(index, weight.at(index), gradient.on(gradient.raw[index])) for index in indices]


def _added(values: list[Tensor], like: Tensor) -> Tensor:
    """The sum of numbers (0-d)."""
    if len(values) == 1:
        return values[0]
    return torch.stack(values).sum() if values else like.new_zeros(())
