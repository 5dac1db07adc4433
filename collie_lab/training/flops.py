"""FLOPs of a step and the peak of a GPU, for model FLOPs utilization (MFU)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from collie_lab.gpus import gpu_of_device
from collie_lab.training.probe import ModelWarning

__all__ = ["StepFlops", "peak_flops"]


def peak_flops(device: torch.device) -> float | None:
    """The 16-bit peak of a GPU of the catalogue; None for others and for CPUs, whose MFU is not guessed."""
    if device.type != "cuda":
        return None
    found = gpu_of_device(torch.cuda.get_device_name(device))
    return None if found is None else found.flops


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward passes of one model.

    6·N per token for a trained weight that multiplies (all matrices but the embedding, the output head
    included), 4·N for a frozen one, which needs no gradient of its own; 6·L·d·s per token for causal
    attention. Of experts those count that a token goes to. Recomputation does not count.
    """

    per_token: int
    per_attended: int

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> StepFlops:
        """From the parameters of a model that is not sharded yet."""
        config = model.config.get_text_config()
        embedding = model.get_input_embeddings().weight
        # Tied to the head, the embedding's matrix multiplies once; else it is only looked up.
        looked_up = embedding if model.get_output_embeddings().weight is not embedding else None
        chosen, experts = _experts(config)
        if experts == 1 and any(name.endswith(".experts") for name, _ in model.named_modules()):
            warnings.warn(f"{config.model_type} does not say to how many experts a token goes: MFU counts all of them",
                          ModelWarning, 2)
        per_token = 0
        for name, p in model.named_parameters():
            if p.ndim >= 2 and p is not looked_up:
                active = p.numel() * chosen // experts if "experts" in name.split(".") else p.numel()
                per_token += (6 if p.requires_grad else 4) * active
        return cls(per_token, 6 * config.num_hidden_layers * config.hidden_size)

    def of(self, tokens: int, attended: int) -> float:
        """FLOPs of so many tokens; `attended` is the sum of the squared document lengths."""
        return float(self.per_token * tokens + self.per_attended * attended)


def _experts(config: PreTrainedConfig) -> tuple[int, int]:
    """To how many of a layer's experts a token goes, and how many there are."""
    def first(*names: str) -> int | None:
        places = (config, getattr(config, "ffn_config", None))
        return next((found for place in places for name in names
                     if isinstance(found := getattr(place, name, None), int)), None)

    experts = first("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    chosen = first("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
    return (chosen, experts) if chosen and experts else (1, 1)
