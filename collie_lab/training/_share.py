"""A rank's share of a checkpoint: which pieces of which tensors it writes, and their copies in the host's memory.

Where several ranks hold the same piece (replicas, a tied embedding on two pipeline stages) one of them copies and
writes it, so that the host's memory holds one copy of the state, not one for each rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor
from typing_extensions import override

from collie_lab.optim.shards import local
from collie_lab.training.memory import uncounted

__all__ = ["HostMemory", "SharePlanner", "choose_share"]


class _Piece(NamedTuple):
    """A piece that a rank holds: of which tensor, how that is laid out, where the piece begins."""

    name: str
    layout: str
    offset: tuple[int, ...]
    bytes: int


def choose_share(state: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> list[WriteItem]:
    """What this rank is to write of the tensors that it holds; called on all ranks of `group` together.

    A name that some ranks lay out otherwise than the first that has it is written as the first lays it out.
    """
    items = [item for item in create_default_local_save_plan(dict(state), is_coordinator=True).items
             if local(state[item.index.fqn]).numel() or not state[item.index.fqn].numel()]
    if group is None:
        return items
    mine = [_piece(item, state[item.index.fqn]) for item in items]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    writers, rank = _choose_writers(everyone), dist.get_rank(group)
    return [item for item, piece in zip(items, mine, strict=True) if writers.get(piece) == rank]


def _piece(item: WriteItem, tensor: Tensor) -> _Piece:
    layout = f"{tuple(tensor.device_mesh.shape)} {tensor.placements}" if isinstance(tensor, DTensor) else ""
    return _Piece(item.index.fqn, layout, tuple(item.index.offset or ()), local(tensor).nbytes)


def _choose_writers(everyone: list[list[_Piece]]) -> dict[_Piece, int]:
    """For every piece one of the ranks that hold it: the one that has least to write so far, largest pieces first."""
    layouts: dict[str, str] = {}
    holders: dict[_Piece, list[int]] = {}
    for rank, pieces in enumerate(everyone):
        for piece in pieces:
            if layouts.setdefault(piece.name, piece.layout) == piece.layout:
                holders.setdefault(piece, []).append(rank)
    writers, loads = {}, [0] * len(everyone)
    for piece in sorted(holders, key=lambda piece: -piece.bytes):
        writers[piece] = rank = min(holders[piece], key=loads.__getitem__)
        loads[rank] += piece.bytes
    return writers


class SharePlanner(DefaultSavePlanner):
    """Has torch write given items from given tensors (local pieces, by name) instead of a state dict."""

    def __init__(self, items: list[WriteItem], tensors: Mapping[str, Tensor]):
        super().__init__(flatten_state_dict=False)
        self._items, self._tensors = items, tensors

    @override
    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    @override
    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._tensors[write_item.index.fqn]


class HostMemory:
    """Copies of tensors on the host. Pinned memory, which copies fast and is slow to get, is kept for the next time."""

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the local pieces, by name; complete when it returns, and valid until the next call."""
        with uncounted():
            copies = {name: self._copy(name, local(tensor)) for name, tensor in tensors.items()}
        if self._pinned:
            torch.cuda.synchronize()
        return copies

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return tensor.to("cpu", copy=True).contiguous()
        buffer = self._pinned.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._pinned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return buffer.copy_(tensor, non_blocking=True)
