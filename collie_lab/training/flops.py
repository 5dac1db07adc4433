"""FLOPs of a step and the peak of a GPU, for model FLOPs utilization (MFU)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

__all__ = ["PEAK_FLOPS", "peak_flops", "step_flops"]

#: Dense bf16 tensor-core peaks, FLOP/s, by a part of the device name (vendor data sheets).
PEAK_FLOPS: dict[str, float] = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The bf16 peak of a known GPU; None for others and for CPUs, whose MFU is not guessed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def step_flops(model: PreTrainedModel, tokens: int, attended: int) -> float:
    """FLOPs of a forward and backward pass: 6·N_matmul per token and 6·L·d·s for causal attention.

    N_matmul counts the weights that multiply: all matrices but the embedding, the output head included.
    `attended` is the sum of the squared document lengths. Recomputation does not count.
    """
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    matmul: int = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    if head is not embedding:  # tied, the one matrix is counted once, and multiplies once
        matmul -= embedding.numel()
    attention: int = config.num_hidden_layers * config.hidden_size * attended
    return 6.0 * matmul * tokens + 6.0 * attention
