"""Which rank does what: the device mesh of a layout, and this rank's place in it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from collie_lab.cells import Parallel

__all__ = ["Place", "build_mesh"]


@dataclass(frozen=True)
class Place:
    """A rank's coordinates. Tensor-parallel ranks are neighbours, pipeline stages lie farthest apart."""

    pp: int = 0
    dp: int = 0
    tp: int = 0

    @classmethod
    def of(cls, rank: int, cell: Parallel) -> Place:
        """The place of a rank in a layout."""
        return cls(rank // (cell.tp * cell.dp), rank // cell.tp % cell.dp, rank % cell.tp)


def build_mesh(cell: Parallel, device_type: str) -> DeviceMesh:
    """The mesh ("pp", "dp", "tp"); with hybrid shards ("pp", "replicate", "shard", "tp").

    Raises:
        ValueError: the process group has another size than the layout.
    """
    if dist.get_world_size() != cell.world_size:
        raise ValueError(f"the layout wants {cell.world_size} ranks, there are {dist.get_world_size()}")
    world = dist.group.WORLD
    if cell.shard is None or cell.shard == cell.dp:
        return _mesh(world, device_type, (cell.pp, cell.dp, cell.tp), ("pp", "dp", "tp"))
    return _mesh(world, device_type, (cell.pp, cell.dp // cell.shard, cell.shard, cell.tp),
                 ("pp", "replicate", "shard", "tp"))


@functools.cache
def _mesh(_world: dist.ProcessGroup | None, device_type: str, shape: tuple[int, ...], names: tuple[str, ...]
          ) -> DeviceMesh:
    """One for all runs of a pool: a mesh has process groups, which stay as long as the process."""
    return init_device_mesh(device_type, shape, mesh_dim_names=names)
