"""Four-bit weights for QLoRA (Dettmers et al., arXiv 2305.14314), by bitsandbytes.

The layers are exchanged while the model has no weights; each matrix is made small as soon as it is read, so that no
rank ever holds more than one in full precision.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collie_lab.cells import QLoRA

__all__ = ["quantize_linears", "quantized_bytes", "quantized_layers", "set_quantized"]


def quantize_linears(model: PreTrainedModel, cell: QLoRA, compute: torch.dtype) -> None:
    """Exchange all linear layers of a model on meta, but its output head, for four-bit ones; in place."""
    from bitsandbytes.nn.modules import Linear4bit

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                layer = Linear4bit(child.in_features, child.out_features, child.bias is not None, compute, cell.double,
                                   cell.quantization, device="meta")
                setattr(parent, name, layer)
    model.is_loaded_in_4bit = True  # by which peft knows it


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weight is to be kept in four bits, by the name of the weight in `model`."""
    return {f"{name}.weight": module for name, module in model.named_modules()
            if hasattr(module.__dict__.get("_parameters", {}).get("weight"), "quant_type")}


def set_quantized(layer: Any, values: Tensor, device: torch.device) -> None:
    """Give a layer its weight [out, in]: quantized on `device`."""
    empty: Any = layer.weight
    made = type(empty)(values, requires_grad=False, compress_statistics=empty.compress_statistics,
                       quant_type=empty.quant_type, quant_storage=empty.quant_storage, module=layer)
    layer.weight = made.to(device)


def quantized_bytes(weight: Any) -> int:
    """Of a weight that is not quantized yet: half a byte a number, and the scale of each block.

    A scale has four bytes; where they are quantized too, one, and four for 256 of them.
    """
    numbers: int = weight.numel()
    blocks = math.ceil(numbers / weight.blocksize)
    scales: int = blocks + 4 * math.ceil(blocks / 256) if weight.compress_statistics else 4 * blocks
    return numbers // 2 + scales
