"""From the model and adapter cells to a module that trains: weights, adapter, attention, loss, recompute."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from collie_lab.cells import SHAPES, Adapter, Experiment, LoRA, Model
from collie_lab.training.loss import attach_loss
from collie_lab.training.packed import ATTENTION, supports_packed_attention
from collie_lab.training.probe import choose_path, probe

__all__ = ["build_model"]


def build_model(experiment: Experiment, device: torch.device) -> tuple[PreTrainedModel, nn.Module]:
    """The causal LM and the module to call: the same, or peft's wrapper with an adapter.

    The model is loaded and tried in fp32; then its weights become what `Training.weights` says. (`precision` decides
    the type of the computation, not theirs.)
    """
    torch.manual_seed(experiment.training.seed)
    model = _load(experiment.model).to(device)
    reference = probe(model)
    if supports_packed_attention(model):
        model.set_attn_implementation(ATTENTION)
    attach_loss(model, experiment.training.loss)
    choose_path(model, reference, experiment.data.packing)
    if experiment.training.weights == "bf16":
        _to_bf16(model)
    if experiment.training.recompute == "full":
        _recompute_blocks(model)
    if experiment.adapter is None:
        return model, model
    return model, _adapt(model, experiment.adapter)


def _load(cell: Model) -> PreTrainedModel:
    options: dict[str, Any] = {"trust_remote_code": cell.trust_remote_code}
    if cell.is_shape:
        fields = {**SHAPES[cell.source], **cell.config}
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    else:
        options["revision"] = cell.revision
        config = AutoConfig.from_pretrained(cell.source, **options, **cell.config)
    if unknown := [name for name in cell.config if not hasattr(type(config)(), name)]:
        raise ValueError(f"Model.config: {type(config).__name__} has no field {unknown[0]!r}")
    if cell.init == "random":
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32,
                                                trust_remote_code=cell.trust_remote_code)
    return AutoModelForCausalLM.from_pretrained(
        cell.source, config=config, dtype=torch.float32, **options)


def _adapt(model: PreTrainedModel, adapter: Adapter) -> nn.Module:
    import peft

    if not isinstance(adapter, LoRA):
        raise TypeError(f"no adapter for the cell {type(adapter).__name__}")
    targets = "all-linear" if adapter.targets is None else list(adapter.targets)
    config = peft.LoraConfig(r=adapter.r, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout,
                             target_modules=targets, task_type="CAUSAL_LM")
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def _to_bf16(model: nn.Module) -> None:
    """The parameters only: rotary frequencies, a buffer, would point far positions elsewhere in bf16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def _recompute_blocks(model: nn.Module) -> None:
    """Every block keeps its input only and runs again in the backward pass.

    Non-reentrant: the reentrant kind gives a weight that several blocks share two gradients, which an
    optimizer in backward would take for two steps.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    for block in [module for module in model.modules() if type(module).__name__ in names]:
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
