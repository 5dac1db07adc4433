"""AdaLoRA (Zhang et al., arXiv 2303.10512) in the loop: its orthogonality in the loss, its ranks after each update.

The importance of a direction is an average over steps. It stands in the optimizer's state beside the moments, and so
goes into checkpoints and comes from them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["attach_budget", "attach_orthogonality", "forget_choice"]


def attach_orthogonality(root: Any, weight: float) -> None:
    """Have the training loss of peft's wrapper include `weight` times the mean of ‖PᵀP − I‖ and ‖QQᵀ − I‖ (eq. 4).

    The loss is a sum over tokens, and so the term counts once for each of them: the mean over all tokens of a step's
    micro-batches and ranks has it once.
    """
    plain = root.forward
    matrices = [(name, parameter) for name, parameter in root.named_parameters()
                if "lora_A" in name or "lora_B" in name]

    @functools.wraps(plain)
    def forward(*args: Any, **inputs: Any) -> Any:
        loss = plain(*args, **inputs)
        if "targets" not in inputs or inputs.get("objective", "train") != "train":
            return loss
        terms = [_distance(matrix if "lora_A" in name else matrix.T) for name, matrix in matrices]
        return loss + weight * torch.stack(terms).mean() * len(inputs["targets"][0])

    root.forward = forward


def _distance(rows: Tensor) -> Tensor:
    """How far rows are from orthonormal, in the Frobenius norm."""
    distance: Tensor = torch.linalg.norm(rows @ rows.T - torch.eye(len(rows), device=rows.device))
    return distance


def attach_budget(root: Any, optimizer: torch.optim.Optimizer, step: Callable[[], int]) -> None:
    """After each of the optimizer's updates, while gradients are there, have peft judge the directions and drop some.

    `step` tells which update it was, counted from 1.
    """
    tuner, config = root.base_model, root.active_peft_config
    allocator = tuner.rankallocator
    parts = {name: parameter for name, parameter in tuner.model.named_parameters()
             if "lora_" in name and parameter.requires_grad}
    for parameter in parts.values():
        optimizer.state[parameter] |= {key: torch.zeros_like(parameter) for key in ("importance", "uncertainty")}

    def recall(*_: Any) -> None:
        """The last choice, where the run was resumed after it: what was dropped is zero until it is updated."""
        if config.rank_pattern is None and step() > config.total_step - config.tfinal:
            config.rank_pattern = {name: (part != 0).flatten().tolist() for name, part in parts.items()
                                   if "lora_E" in name}

    def update(*_: Any) -> None:
        averages = {key: {name: optimizer.state[parameter][key] for name, parameter in parts.items()}
                    for key in ("importance", "uncertainty")}
        allocator.ipt = {name: torch.zeros_like(parameter) for name, parameter in parts.items()}
        allocator.exp_avg_ipt, allocator.exp_avg_unc = dict(averages["importance"]), dict(averages["uncertainty"])
        tuner.update_and_allocate(step())
        for key, found in (("importance", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
            for name, values in found.items():
                averages[key][name].copy_(values)

    optimizer.register_step_pre_hook(recall)
    optimizer.register_step_post_hook(torch.no_grad()(update))


def forget_choice(root: Any, step: int) -> None:
    """Drop the last choice of directions, where the weights are again those after a `step` before it."""
    config = root.active_peft_config
    if step < config.total_step - config.tfinal:
        config.rank_pattern = None
