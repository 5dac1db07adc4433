"""What a checkpoint holds, by name: trained weights, the optimizer's state, each rank's random state."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collie_lab.optim import RuleOptimizer

__all__ = ["NORM", "model_state", "optimizer_state", "parameter_of", "random_state", "rank_and_world"]

#: The gradient norm of the step before.
NORM = "norm"


def model_state(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()
            if parameter.requires_grad}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"optimizer.{names[parameter]}|{key}": value
             for parameter, entries in optimizer.state.items() for key, value in entries.items() if value is not None}
    if isinstance(optimizer, RuleOptimizer) and optimizer.norm is not None:
        state[NORM] = optimizer.norm  # the next gradient may be clipped by it
    return state


def random_state(rank: int) -> dict[str, Tensor]:
    state = {f"random.{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"random.{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


def parameter_of(name: str) -> str:
    """The parameter to which an entry of the optimizer's state belongs."""
    return name.removeprefix("optimizer.").split("|")[0]


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
