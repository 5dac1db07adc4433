"""Where the local piece of a parameter lies in the whole, and sums over all its pieces.

FSDP2 and tensor parallelism shard parameters as DTensors. Element-wise rules need not know; rules that look at
rows, columns or norms sum over the ranks that hold the other pieces, and over no others.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

__all__ = ["Shards", "global_norm", "local", "local_gradient"]


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor, sharing its memory; any other tensor itself."""
    if torch.is_grad_enabled():
        tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The local piece of a parameter's gradient, laid out as the parameter.

    Tensor parallelism leaves the gradient of a replicated parameter (a norm's weight) as a partial sum.
    """
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and (
            gradient.placements != parameter.placements):
        with torch.no_grad():
            gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


class Shards:
    """The layout of one parameter.

    Attributes:
        shape: of the whole parameter.
        dims: the tensor dimensions that are cut, one for each cut of the mesh.
        offset: the place in the flattened whole of the first local element (of rows that are cut; what is cut
            otherwise has no one place, but a number of its own all the same).
    """

    def __init__(self, parameter: Tensor):
        self.shape = parameter.shape
        self.dims: tuple[int, ...] = ()
        self.offset = 0
        self._mesh: DeviceMesh | None = None
        self._placements: tuple[Placement, ...] = ()
        self._groups: list[tuple[int, dist.ProcessGroup]] = []
        if isinstance(parameter, DTensor):
            self._read(parameter)

    def _read(self, parameter: DTensor) -> None:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh = parameter.device_mesh
        self._mesh, self._placements = mesh, parameter.placements
        for axis, placement in enumerate(self._placements):
            if placement.is_partial():
                raise ValueError("a parameter that is a partial sum over ranks cannot be updated")
            dim = getattr(placement, "dim", None)
            if dim is not None and mesh.size(axis) > 1:
                self._groups.append((dim, mesh.get_group(axis)))
        self.dims = tuple(dim for dim, _ in self._groups)
        if parameter.to_local().numel():
            _, offsets = compute_local_shape_and_global_offset(self.shape, mesh, self._placements)
            self.offset = sum(at * math.prod(self.shape[dim + 1:]) for dim, at in enumerate(offsets))

    def sum(self, value: Tensor, *dims: int) -> Tensor:
        """`value` summed over the ranks that cut one of `dims` (all, if none is named); in place."""
        for dim, group in self._groups:
            if not dims or dim in dims:
                dist.all_reduce(value, group=group)
        return value

    def like_parameter(self, piece: Tensor) -> Tensor:
        """A local tensor of the parameter's shape as a sharded one, without a copy."""
        if self._mesh is None:
            return piece
        return DTensor.from_local(piece, self._mesh, self._placements, run_check=False,
                                  shape=self.shape, stride=_strides(self.shape))

    def without(self, dim: int, piece: Tensor) -> Tensor:
        """A local tensor that lacks dimension `dim` of the parameter as a sharded one, without a copy."""
        if self._mesh is None:
            return piece
        shape = torch.Size([size for at, size in enumerate(self.shape) if at != dim])
        placements = tuple(_moved(placement, dim) for placement in self._placements)
        return DTensor.from_local(piece, self._mesh, placements, run_check=False, shape=shape, stride=_strides(shape))

    @property
    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """The process groups that hold the pieces."""
        return tuple(group for _, group in self._groups)


def global_norm(norms: list[tuple[Tensor, Shards]], stages: dist.ProcessGroup | None = None) -> Tensor:
    """The norm of the whole gradient from the norms (0-d) of the local pieces of its parameters.

    `stages` are the ranks that hold other parameters of the model: the stages of a pipeline.
    """
    by_layout: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for norm, shards in norms:
        by_layout.setdefault(shards.groups, []).append(norm)
    total = None
    for groups, values in by_layout.items():
        part = torch.stack(values).square().sum()
        for group in groups:
            dist.all_reduce(part, group=group)
        total = part if total is None else total + part
    if total is None:
        return torch.zeros(())
    if stages is not None:
        dist.all_reduce(total, group=stages)
    return total.sqrt()


def _moved(placement: Placement, dim: int) -> Placement:
    """A placement on a tensor that lost dimension `dim`."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    cut = getattr(placement, "dim", None)
    if cut is None or cut == dim:
        return Replicate()
    if cut < dim:
        return placement
    factor = getattr(placement, "split_factor", None)  # FSDP2 on top of tensor parallelism
    return Shard(cut - 1) if factor is None else _StridedShard(cut - 1, split_factor=factor)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1:]) for dim in range(len(shape)))
