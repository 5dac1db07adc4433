"""Strategies: what a layout does to the model, its gradients and their norm. One face for the loop.

Losses arrive here as sums over tokens, scaled so that the mean over the data-parallel ranks is right.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from collie_lab.cells import Parallel

__all__ = ["Replicated", "Sharded", "Single", "Strategy", "build_strategy"]


class Strategy(ABC):
    """How one rank trains its part of the model."""

    def __init__(self, device: torch.device, precision: str):
        self.device, self.precision = device, precision

    dp_rank: int = 0
    dp_size: int = 1

    @abstractmethod
    def wrap(self, model: nn.Module, in_backward: bool) -> nn.Module:
        """The model as the loop calls it; parameters may be replaced by shards in place."""

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass: autocast where the weights are kept in fp32."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def micro_batch(self, model: nn.Module, exchange: bool) -> contextlib.AbstractContextManager[Any]:
        """The context of one micro-batch; gradients are exchanged only where it says so."""
        return contextlib.nullcontext()

    @property
    def reduce(self) -> Callable[[Tensor], None] | None:
        """Averages one gradient over the replicas, in place: for optimizers that act inside the backward pass.

        None where nothing has to be averaged: one process, or FSDP2, which does it.
        """
        return None

    def total(self, values: Tensor) -> Tensor:
        """The sum over all data-parallel ranks."""
        return values

    @contextlib.contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """The context in which every rank may call the model a different number of times."""
        yield


class Single(Strategy):
    """One process."""

    @override
    def wrap(self, model: nn.Module, in_backward: bool) -> nn.Module:
        return model


class _Distributed(Strategy):
    def __init__(self, device: torch.device, precision: str):
        super().__init__(device, precision)
        self.dp_rank, self.dp_size = dist.get_rank(), dist.get_world_size()

    @override
    def total(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values


class Replicated(_Distributed):
    """The whole model on every rank; gradients are averaged by torch's DDP, in buckets during backward.

    Under an optimizer in backward there is no time for buckets, and DDP's own reduction would come after
    the update, so that the replicas would drift apart unseen: each gradient is averaged in its hook.
    """

    @override
    def wrap(self, model: nn.Module, in_backward: bool) -> nn.Module:
        if in_backward:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True,
                                       broadcast_buffers=False)

    @override
    def micro_batch(self, model: nn.Module, exchange: bool) -> contextlib.AbstractContextManager[Any]:
        if exchange or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    @property
    @override
    def reduce(self) -> Callable[[Tensor], None]:
        return self._average

    def _average(self, gradient: Tensor) -> None:
        dist.all_reduce(gradient.div_(self.dp_size))


class Sharded(_Distributed):
    """FSDP2: parameters, gradients and optimizer state in shards, gathered block by block.

    `zero=3` frees a block's gathered weights after its forward pass, `zero=2` keeps them until its
    backward pass is over.
    """

    def __init__(self, device: torch.device, precision: str, zero: int):
        super().__init__(device, precision)
        self._reshard = zero == 3

    @override
    def wrap(self, model: nn.Module, in_backward: bool) -> nn.Module:
        mesh = init_device_mesh(self.device.type, (self.dp_size,), mesh_dim_names=("dp",))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) \
            if self.precision == "bf16" else MixedPrecisionPolicy()
        for block in _blocks(model):
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=self._reshard)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=self._reshard)
        return model

    @override
    def compute(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()  # FSDP2 casts by its own policy

    @override
    def micro_batch(self, model: nn.Module, exchange: bool) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(exchange)
        return contextlib.nullcontext()

    @override
    @contextlib.contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """Gather everything once: a rank that generates longer would wait for peers in a collective."""
        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(self._reshard, recurse=False)
                module.reshard()


def build_strategy(cell: Parallel, device: torch.device, precision: str) -> Strategy:
    """The strategy of a layout; the process group exists already where there are several ranks."""
    if cell.world_size == 1:
        return Single(device, precision)
    if cell.zero:
        return Sharded(device, precision, cell.zero)
    return Replicated(device, precision)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a transformers model, by the class names it says must not be split."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]
