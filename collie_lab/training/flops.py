"""FLOPs of a step and the peak of a GPU, for model FLOPs utilization (MFU)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from collie_lab.gpus import gpu_of_device

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
    attention. Recomputation does not count.
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
        per_token = sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters()
                        if p.ndim >= 2 and p is not looked_up)
        return cls(per_token, 6 * config.num_hidden_layers * config.hidden_size)

    def of(self, tokens: int, attended: int) -> float:
        """FLOPs of so many tokens; `attended` is the sum of the squared document lengths."""
        return float(self.per_token * tokens + self.per_attended * attended)
