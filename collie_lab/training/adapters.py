"""From an adapter cell to a model of which only little is trained.

A model is adapted while its weights are on meta, before it is laid out, so no rank ever holds them whole. What the
adapter adds is real: it is small, and drawn alike on all ranks.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from collie_lab.cells import IA3, OFT, AdaLoRA, Adapter, Freeze, LoRA, Prefix, Prompt, PTuning
from collie_lab.data.tensor_names import names_one_of

__all__ = ["adapt"]


def adapt(model: PreTrainedModel, cell: Adapter, steps: int = 100, revision: str | None = None) -> nn.Module:
    """The model as the cell trains it in so many steps: the same with `Freeze`, else peft's wrapper, which notes of
    which revision of the model it is.

    Raises:
        ValueError: a target or pattern that names nothing in the model.
    """
    if isinstance(cell, Freeze):
        return _freeze(model, cell)
    import peft

    for target in getattr(cell, "targets", None) or ():
        if not names_one_of(target, (name for name, _ in model.named_modules())):
            raise ValueError(f"{type(cell).__name__}.targets: {type(model).__name__} has no layer {target!r}; its "
                             "linear layers: " + ", ".join(sorted(_linear_names(model))))
    with _stand_ins(model):
        adapted: nn.Module = peft.get_peft_model(model, _peft_config(cell, steps, model), revision=revision)
    return adapted


def _linear_names(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _peft_config(cell: Adapter, steps: int, model: PreTrainedModel) -> Any:
    import peft

    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    match cell:
        case LoRA():
            return peft.LoraConfig(r=cell.r, lora_alpha=cell.alpha, lora_dropout=cell.dropout, use_rslora=cell.rslora,
                                   use_dora=cell.dora, target_modules=_targets(cell),
                                   init_lora_weights="gaussian" if cell.init == "gaussian" else True, **task)
        case AdaLoRA():
            return peft.AdaLoraConfig(
                init_r=cell.init_r, target_r=cell.target_r, lora_alpha=cell.alpha, lora_dropout=cell.dropout,
                target_modules=_targets(cell), total_step=steps, tinit=int(cell.warmup * steps),
                tfinal=int(cell.final * steps), deltaT=cell.every, beta1=cell.betas[0], beta2=cell.betas[1],
                orth_reg_weight=cell.orthogonal, **task)
        case IA3(targets=None):
            return peft.IA3Config(**task)
        case IA3():
            return peft.IA3Config(target_modules=list(cell.targets or ()),
                                  feedforward_modules=list(cell.feedforward), **task)
        case OFT():
            return peft.OFTConfig(oft_block_size=cell.block_size, module_dropout=cell.dropout,
                                  target_modules=_targets(cell), **task)
        case Prompt():
            return peft.PromptTuningConfig(num_virtual_tokens=cell.tokens, **task)
        case PTuning():
            return peft.PromptEncoderConfig(num_virtual_tokens=cell.tokens, encoder_hidden_size=cell.hidden, **task)
        case Prefix():
            return peft.PrefixTuningConfig(num_virtual_tokens=cell.tokens, prefix_projection=cell.projection,
                                           encoder_hidden_size=cell.hidden, **_single_head(model.config), **task)
    raise TypeError(f"no adapter for the cell {type(cell).__name__}")


def _single_head(config: Any) -> dict[str, int]:
    """For peft's configuration of a prefix, where all heads share one key and one value, which peft may not know."""
    if not getattr(config, "multi_query", False) or getattr(config, "new_decoder_architecture", False):
        return {}
    return {"num_attention_heads": 1, "token_dim": config.hidden_size // config.num_attention_heads}


def _targets(cell: LoRA | AdaLoRA | OFT) -> str | list[str]:
    return "all-linear" if cell.targets is None else list(cell.targets)


def _freeze(model: nn.Module, cell: Freeze) -> nn.Module:
    for pattern in cell.train:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in model.named_parameters(remove_duplicate=False)):
            raise ValueError(f"Freeze.train: no parameter of {type(model).__name__} matches {pattern!r}")
    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):  # a tied one has several names
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in cell.train):
            parameter.requires_grad_(True)
    return model


@contextlib.contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Within it the model's parameters are on the CPU, all elements of each the same number in memory.

    peft puts what it adds where the adapted weights are; on meta its first values would be lost.
    """
    places = [(module, leaf, parameter) for module in model.modules()
              for leaf, parameter in module.named_parameters(recurse=False)]
    made = {id(parameter): _stand_in(parameter) for _, _, parameter in places}
    for module, leaf, parameter in places:
        setattr(module, leaf, made[id(parameter)])
    try:
        yield
    finally:
        for module, leaf, parameter in places:
            parameter.requires_grad_(getattr(module, leaf).requires_grad)
            setattr(module, leaf, parameter)


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    made = nn.Parameter(torch.ones((), dtype=parameter.dtype).expand(parameter.shape), parameter.requires_grad)
    vars(made).update(vars(parameter))  # what a quantized one says of itself
    return made
