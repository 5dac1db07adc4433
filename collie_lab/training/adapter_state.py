"""What a peft folder holds of an adapter: its trained values under peft's names, right for the model as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from collie_lab.training.first_values import FIRST

__all__ = ["adapter_state"]


@torch.no_grad()
def adapter_state(model: Any, config: Any, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder for `PeftModel.from_pretrained`, from the `trained` parameters [whole] of a rank.

    `config` is peft's; it is changed where the folder's differs.
    """
    from peft import get_peft_model_state_dict

    if not trained:  # other ranks write
        return {}
    if config.is_prompt_learning:
        return _embeddings(model, trained)
    state: dict[str, Tensor] = get_peft_model_state_dict(model, state_dict=trained)
    if hasattr(config, "target_r"):  # AdaLoRA; peft has renamed it just now
        config.rank_pattern = model.peft_config[model.active_adapter].rank_pattern
    first = {name: values for name, module in model.named_modules() if (values := getattr(module, FIRST, None))}
    return _as_lora(state, first, config) if first else state


def _embeddings(model: Any, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt, or what a network makes of it (a prefix: the keys and values of all layers): [tokens, width]."""
    encoder: nn.Module = model.prompt_encoder[model.active_adapter]
    prefix = f"prompt_encoder.{model.active_adapter}."
    values = {name.removeprefix(prefix): whole for name, whole in trained.items() if name.startswith(prefix)}
    return {"prompt_embeddings": functional_call(encoder, values, (model.prompt_tokens[model.active_adapter],))}


def _as_lora(state: dict[str, Tensor], first: dict[str, tuple[Tensor, Tensor]], config: Any) -> dict[str, Tensor]:
    """B·A beside a weight out of which B₀·A₀ was taken is [B, B₀]·[A; −A₀] beside the weight as it was.

    So does peft's `LoraModel.subtract_mutated_init`. The scale, alpha/r or alpha/√r, must stay.
    """
    for name, (a, b) in first.items():
        if (key := f"{name}.lora_A.weight") in state:
            state[key] = torch.cat([state[key], -a.to(state[key])])
        if (key := f"{name}.lora_B.weight") in state:
            state[key] = torch.cat([state[key], b.to(state[key])], dim=1)
    config.r *= 2
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2
    return state
