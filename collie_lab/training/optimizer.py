"""From the optimizer cell and the layout to the optimizer of a run."""

from __future__ import annotations

import torch
from torch import nn

from collie_lab import optim
from collie_lab.cells import Experiment, LibraryOptimizer
from collie_lab.parallel import Strategy
from collie_lab.training.schedule import learning_rate_factor

__all__ = ["build_optimizer", "set_learning_rate"]


def build_optimizer(experiment: Experiment, model: nn.Module, strategy: Strategy) -> torch.optim.Optimizer:
    """For the trained parameters of `model`, by its own names: wrappers lengthen them."""
    cell, training = experiment.scaled_optimizer, experiment.training
    if isinstance(cell, LibraryOptimizer):
        return optim.build(cell, model, elsewhere=strategy.trained)
    return optim.build(strategy.held(cell), model, max_value=training.clip_grad_value, seed=training.seed,
                       elsewhere=strategy.trained, **strategy.optimizer_options(training.clip_grad_norm))


def set_learning_rate(optimizer: torch.optim.Optimizer, experiment: Experiment, step: int) -> None:
    """Each group's own, times the schedule's factor at a step, counted from 1."""
    factor = learning_rate_factor(experiment.training, step)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
