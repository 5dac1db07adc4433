"""Messages between tensor-parallel ranks inside the forward pass, each with its mirror image in the backward pass.

A tensor is *whole* where all ranks hold the same, a *piece* where each holds a part along a dimension, a *share* where
the whole is the sum over the ranks. A gradient is whole where its tensor is whole, unless said otherwise
(Shoeybi et al., arXiv 1909.08053; Korthikanti et al., arXiv 2205.05198).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["copy", "gather", "gather_for_shares", "reduce", "reduce_scatter", "split"]

Group = dist.ProcessGroup

# Their names from torch 2.13 on, and before.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sum_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copy(whole: Tensor, group: Group) -> Tensor:
    """The same tensor, where each rank goes on with a part of the weights: gradients are shares, and are summed."""
    result: Tensor = _Copy.apply(whole, group)
    return result


def reduce(share: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' shares: whole."""
    result: Tensor = _Reduce.apply(share, group)
    return result


def gather(piece: Tensor, dim: int, group: Group) -> Tensor:
    """The whole from the pieces along `dim`, where all ranks go on alike: gradients are whole."""
    result: Tensor = _Gather.apply(piece, dim, group)
    return result


def split(whole: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's piece along `dim` of what is whole; the gradient is gathered."""
    result: Tensor = _Split.apply(whole, dim, group)
    return result


def gather_for_shares(piece: Tensor, dim: int, group: Group) -> Tensor:
    """The whole from the pieces along `dim`, where each rank goes on with part of the weights: gradients are shares."""
    result: Tensor = _GatherForShares.apply(piece, dim, group)
    return result


def reduce_scatter(share: Tensor, dim: int, group: Group) -> Tensor:
    """This rank's piece along `dim` of the sum of the ranks' shares."""
    result: Tensor = _ReduceScatter.apply(share, dim, group)
    return result


def _sum(share: Tensor, group: Group) -> Tensor:
    total = share.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _all_gather(piece: Tensor, dim: int, group: Group) -> Tensor:
    front = piece.movedim(dim, 0).contiguous()
    whole = front.new_empty((front.shape[0] * group.size(), *front.shape[1:]))
    _gather_into(whole, front, group=group)
    return whole.movedim(0, dim)


def _scattered_sum(share: Tensor, dim: int, group: Group) -> Tensor:
    front = share.movedim(dim, 0).contiguous()
    piece = front.new_empty((front.shape[0] // group.size(), *front.shape[1:]))
    _scatter_sum_into(piece, front, group=group)
    return piece.movedim(0, dim)


def _own_piece(whole: Tensor, dim: int, group: Group) -> Tensor:
    return whole.chunk(group.size(), dim)[group.rank()].contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(gradients[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: Group) -> Tensor:
        return _sum(share, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(piece, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _own_piece(gradients[0], ctx.dim, ctx.group), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _own_piece(whole, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _all_gather(gradients[0], ctx.dim, ctx.group), None, None


class _GatherForShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(piece, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _scattered_sum(gradients[0], ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _scattered_sum(share, dim, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _all_gather(gradients[0], ctx.dim, ctx.group), None, None
