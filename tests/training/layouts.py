"""A tiny model in the layouts that checkpoints and exports must know, made by hand; on every rank of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from collie_lab.cells import SHAPES

__all__ = ["LAYOUTS", "lay_out", "step", "tiny", "whole"]

LAYOUTS = {"one": 1, "zero3": 2, "tp": 2, "tp x zero3": 4, "pipeline x zero3": 4}
"""The layouts, and on how many ranks they stand."""


class _Skip(nn.Module):
    """What stands in a pipeline stage for the parts of other stages."""


def tiny(**fields: object) -> PreTrainedModel:
    """Two layers and tied embeddings; the same weights whenever it is called with the same fields."""
    torch.manual_seed(0)
    shape = {**SHAPES["llama-tiny"], **fields}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))


def lay_out(model: PreTrainedModel, layout: str) -> PreTrainedModel:
    """This rank's part of `model`, in place."""
    match layout:
        case "zero3":
            fully_shard(model)
        case "tp":
            _distribute(model)
        case "tp x zero3":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            _distribute(model, mesh["tp"])
            fully_shard(model, mesh=mesh["dp"])
        case "pipeline x zero3":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
            _cut(model, mesh["pp"].get_local_rank())
            fully_shard(model, mesh=mesh["dp"])
    return model


def _distribute(model: nn.Module, mesh: object = None) -> None:
    """Matrices cut by rows or columns in turn, the rest on all ranks, as tensor parallelism does."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    seen: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in seen:
                cut: Placement = Shard(len(seen) % 2) if parameter.ndim == 2 else Replicate()
                seen[parameter] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [cut]),
                                               requires_grad=parameter.requires_grad)
            setattr(module, name, seen[parameter])


def _cut(model: PreTrainedModel, stage: int) -> None:
    """A stage of two: one layer each, and the tied embeddings in both."""
    inner = model.get_decoder()
    inner.layers[1 - stage] = _Skip()
    if stage == 0:
        inner.norm = _Skip()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step with gradients that follow from the weights alone, the same in every layout."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = parameter.detach() * 0.5 + 0.01
    optimizer.step()
    optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its pieces."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
