"""The weights of a model, on the device and in the type in which they are trained."""

from __future__ import annotations

import torch
from torch import nn

from collie_lab.cells import Model

__all__ = ["fill"]


def fill(model: nn.Module, cell: Model, seed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Move the parameters to `device` and make them `dtype`; rotary frequencies, a buffer, stay fp32.

    In bf16 they would point far positions elsewhere.
    """
    model.to(device)
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
