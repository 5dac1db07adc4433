"""Data parallelism: FSDP2's shards, and gradients averaged by hand where nothing else does it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

__all__ = ["average", "average_all", "blocks", "shard", "unsharded"]

_BUCKET_BYTES = 25 * 2**20


def shard(model: nn.Module, mesh: DeviceMesh, precision: str, *, reshard: bool) -> None:
    """Shard the blocks of a model, and what lies outside of them, in place.

    With `reshard`, a block's gathered weights are freed after its forward pass (ZeRO-3), else after its backward pass.
    On a mesh of two dimensions, the first holds replicas of the shards on the second.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) \
        if precision == "bf16" else MixedPrecisionPolicy()
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


@contextlib.contextmanager
def unsharded(model: nn.Module, *, reshard: bool) -> Iterator[None]:
    """Gather everything once: a rank that generates longer would wait for peers in a collective."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(reshard, recurse=False)
            module.reshard()


def average(gradient: Tensor, group: dist.ProcessGroup) -> None:
    """Replace one gradient by its mean over the replicas."""
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    dist.all_reduce(local.div_(group.size()), group=group)


def average_all(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Replace all gradients by their means over the replicas, many in one message.

    A parameter that one replica's tokens did not reach (an expert) counts as zero there.
    """
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if bucket and (size + local.nbytes > _BUCKET_BYTES or bucket[0].dtype != local.dtype):
            _average_bucket(bucket, group)
            bucket, size = [], 0
        bucket.append(local)
        size += local.nbytes
    if bucket:
        _average_bucket(bucket, group)


def _average_bucket(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    flat = _flatten_dense_tensors(gradients)
    average(flat, group)
    torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a transformers model, by the class names it says must not be split; FSDP2's too."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if any(kind.__name__ in names for kind in type(module).__mro__)]
