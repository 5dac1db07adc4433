"""From the model and adapter cells to a module that trains: weights, adapter, attention, loss, recompute."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from collie_lab.cells import AdaLoRA, Experiment, Parallel, QLoRA, VirtualTokens
from collie_lab.data import Extension, Tokenizer
from collie_lab.parallel import Strategy
from collie_lab.size import Size
from collie_lab.training.adapters import adapt
from collie_lab.training.blocks import wrap_blocks
from collie_lab.training.budget import attach_orthogonality
from collie_lab.training.first_values import set_first_values
from collie_lab.training.flops import StepFlops
from collie_lab.training.loss import attach_loss, attach_whole_loss
from collie_lab.training.packed import ATTENTION
from collie_lab.training.probe import ModelWarning, find_path
from collie_lab.training.quantize import quantize_linears
from collie_lab.training.size import size_of
from collie_lab.training.virtual import attach_virtual_tokens
from collie_lab.training.weights import blueprint, fill

__all__ = ["BuiltModel", "build_model"]


class BuiltModel(NamedTuple):
    """A causal LM in its layout, and what was counted while it was whole."""

    causal_lm: PreTrainedModel
    root: nn.Module
    """What is called: the same, or peft's wrapper with an adapter."""
    flops: StepFlops
    size: Size


def build_model(experiment: Experiment, device: torch.device, strategy: Strategy | None = None,
                extension: Extension | None = None, tokenizer: Tokenizer | None = None) -> BuiltModel:
    """The model of an experiment in the layout of `strategy` (default: one process), ready to train.

    `extension` is what the preparation of its data made of an `ExtendTokenizer`; `tokenizer` is for a prompt that
    begins as a text. `Training.weights` says how weights are kept; `precision` decides the type of the computation, not
    theirs.
    """
    training = experiment.training
    strategy = strategy or Strategy(Parallel(), device, training.precision)
    torch.manual_seed(training.seed)
    model = blueprint(experiment.model, extension)
    path = find_path(model, experiment.data.packing)
    if path.flat:
        model.set_attn_implementation(ATTENTION)
    elif strategy.tensor is not None and getattr(model.config.get_text_config(), "attention_dropout", None):
        raise ValueError(f"{model.config.model_type}: attention dropout with tp is not supported for this family; "
                         'Model(..., config={"attention_dropout": 0.0})')
    if not path.flat and strategy.cell.sequence_parallel:
        raise ValueError(f"{model.config.model_type}: sequence_parallel cuts rows of packed documents, and this family "
                         "takes padded ones with masks; leave it out")
    if path.whole_logits:
        if strategy.cell.tp * strategy.cell.pp > 1:
            raise ValueError(f"{model.config.model_type} makes its logits in a way of its own, which only whole models "
                             "can; use dp and zero")
        attach_whole_loss(model, training.loss)
    else:
        attach_loss(model, training.loss, strategy.tensor)
    wrap_blocks(model, recompute=training.recompute == "full", compiled=training.compile)
    if isinstance(experiment.adapter, QLoRA):
        quantize_linears(model, experiment.adapter, torch.bfloat16 if training.precision == "bf16" else torch.float32)
    root = model if experiment.adapter is None else adapt(
        model, experiment.adapter, training.steps, experiment.model.revision)
    if isinstance(experiment.adapter, VirtualTokens):
        attach_virtual_tokens(root, experiment.adapter, flat=path.flat, recompute=training.recompute == "full")
    if isinstance(experiment.adapter, AdaLoRA):
        attach_orthogonality(root, experiment.adapter.orthogonal)
    if extension is not None and not model.get_input_embeddings().weight.requires_grad:
        warnings.warn("the embedding is frozen: the rows of new tokens stay what they begin with", ModelWarning, 2)
    size, flops = size_of(root, experiment), StepFlops.of_model(model)
    dtype = torch.bfloat16 if training.weights == "bf16" else torch.float32
    strategy.lay_out(model, root, dtype)
    if not any(parameter.requires_grad for parameter in root.parameters()):
        raise ValueError("Parallel.pp: one stage of the pipeline has nothing to train with this adapter; take less pp, "
                         "or let it train something in every layer")
    fill(root, experiment.model, training.seed, device, dtype, extension)
    set_first_values(root, experiment.adapter, strategy.gather, tokenizer, training.seed)
    return BuiltModel(model, root, flops, size)
