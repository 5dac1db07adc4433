"""A model and its optimizer in the host's memory, laid out as FSDP2 would: what a checkpoint keeps of an engine.

An engine that keeps weights and states in flat pieces of its own is copied into it, or set from it, one parameter at
a time. Checkpoints then look the same as everyone else's, and a run can go on under another layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from typing_extensions import override

from collie_lab.optim import RuleOptimizer

__all__ = ["Snapshot", "keep", "make_snapshot"]


class Snapshot(nn.Module):
    """Trained parameters by their names in the model: DTensors on the host, rows dealt to the ranks."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        super().__init__()
        self._by_name = parameters

    @override
    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
                         ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._by_name.items()


def make_snapshot(shapes: Mapping[str, tuple[torch.Size, torch.dtype]], optimizer: RuleOptimizer, mesh: DeviceMesh
                  ) -> tuple[Snapshot, RuleOptimizer]:
    """Empty weights of the given shapes and types, and an optimizer of the same rule with empty states for them.

    bf16 weights have an fp32 master copy among the states.
    """
    parameters = {name: nn.Parameter(_deal(torch.zeros(shape, dtype=dtype), mesh))
                  for name, (shape, dtype) in shapes.items()}
    states = RuleOptimizer(list(parameters.values()), optimizer.rule, rounding="master", engine="eager",
                           **optimizer.defaults)
    return Snapshot(parameters), states


def keep(target: Tensor, whole: Tensor) -> None:
    """Copy this rank's rows of a whole tensor into a snapshot's."""
    assert isinstance(target, DTensor)
    target.to_local().copy_(_deal(whole, target.device_mesh).to_local())


def _deal(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    placement: Any = Shard(0) if whole.ndim else Replicate()
    return distribute_tensor(whole, mesh, [placement], src_data_rank=None)  # every rank has it: nothing is sent
