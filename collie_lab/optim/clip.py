"""The gradient norm over all shards, and clipping by it."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from collie_lab.optim.rounding import compute_dtype
from collie_lab.optim.shards import Shards, global_norm, local

__all__ = ["clip_coefficient", "clip_gradients", "gradient_norms"]


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What to multiply a gradient by so that its norm is at most `max_norm` (0-d)."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def gradient_norms(pieces: list[Tensor]) -> list[Tensor]:
    """The norm (0-d) of each of the local pieces of gradients, in the type of the computation."""
    if len({piece.dtype for piece in pieces}) == 1:
        return list(torch._foreach_norm(pieces, dtype=compute_dtype(pieces[0].dtype)))
    return [torch.linalg.vector_norm(piece, dtype=compute_dtype(piece.dtype)) for piece in pieces]


@torch.no_grad()
def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None, max_value: float | None = None, *,
                   stages: dist.ProcessGroup | None = None, copies: Collection[Tensor] = ()) -> Tensor:
    """Clip the gradients of an optimizer's parameters in place; their norm before (0-d).

    `stages` are the ranks of a pipeline, `copies` parameters that another of them counts.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for parameter in parameters:
        if isinstance(parameter.grad, DTensor):  # tensor parallelism leaves some as partial sums
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
    gradients = [local(p.grad) for p in parameters]
    copied = {id(parameter) for parameter in copies}
    norm = global_norm([(norm, Shards(parameter)) for norm, parameter in
                        zip(gradient_norms(gradients), parameters, strict=True) if id(parameter) not in copied], stages)
    if max_norm is not None:
        torch._foreach_mul_(gradients, clip_coefficient(norm, max_norm))
    if max_value is not None:
        torch._foreach_clamp_max_(gradients, max_value)
        torch._foreach_clamp_min_(gradients, -max_value)
    return norm
