"""The optimizers, usable in anyone's own loop. Imports torch and the optimizer cells, nothing above them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from collie_lab import cells
from collie_lab.optim.groups import parameter_groups
from collie_lab.optim.lomo import Lomo

__all__ = ["Lomo", "build", "parameter_groups"]


def build(cell: cells.Optimizer, model: nn.Module, reduce: Callable[[Tensor], None] | None = None
          ) -> torch.optim.Optimizer:
    """The torch optimizer of a cell for the trained parameters of `model`.

    Args:
        cell: which rule, with its hyper-parameters.
        model: already in its final layout (sharded, adapted); its parameters are taken as they are.
        reduce: for rules in backward on replicas: averages one gradient over the ranks, in place.
    """
    groups = parameter_groups(model, cell.weight_decay)
    # fused and foreach are said outright: torch's own choice differs between devices and tensor types, and
    # its fused SGD knows no sharded parameters.
    match cell:
        case cells.AdamW():
            return torch.optim.AdamW(groups, lr=cell.lr, betas=cell.betas, eps=cell.eps, fused=True)
        case cells.SGD():
            return torch.optim.SGD(groups, lr=cell.lr, momentum=cell.momentum, nesterov=cell.nesterov, foreach=True)
        case cells.Lomo():
            return Lomo(groups, lr=cell.lr, reduce=reduce)
    raise TypeError(f"no optimizer for the cell {type(cell).__name__}")
