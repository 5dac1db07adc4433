"""The optimizers, usable in anyone's own loop. Imports torch and the optimizer cells, nothing above them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from collie_lab import cells
from collie_lab.optim.adalomo import AdaLomo
from collie_lab.optim.clip import clip_coefficient, clip_gradients
from collie_lab.optim.groups import parameter_groups
from collie_lab.optim.library import averaged, build_library_optimizer
from collie_lab.optim.optimizer import RuleOptimizer
from collie_lab.optim.rule import Rule
from collie_lab.optim.rules import SGD, AdamW, Adan, Lion, SophiaG
from collie_lab.optim.slot import release

__all__ = [
    "SGD", "AdaLomo", "AdamW", "Adan", "Lion", "Rule", "RuleOptimizer", "SophiaG", "averaged", "build",
    "build_rule", "clip_coefficient", "clip_gradients", "parameter_groups",
]


def build(cell: cells.Optimizer, model: nn.Module, *, reduce: Callable[[Tensor], None] | None = None,
          max_norm: float | None = None, max_value: float | None = None, elsewhere: Iterable[str] = (),
          **options: Any) -> torch.optim.Optimizer:
    """The torch optimizer of a cell for the trained parameters of `model`.

    Args:
        cell: which rule, with its hyper-parameters.
        model: already in its final layout (sharded, adapted); its parameters are taken as they are.
        reduce: in backward on replicas: averages one gradient over the ranks, in place.
        max_norm: clip by the norm of the whole gradient.
        max_value: clip every element.
        elsewhere: names of trained parameters that other ranks have, the stages of a pipeline: see `parameter_groups`.
        options: further options of `RuleOptimizer`: `engine`, `seed`, `record_norm`. An optimizer of a library takes
            none of all these: `clip_gradients` is for its loop.

    Raises:
        ValueError: the model and the cell do not go together; the message says why.
    """
    groups = parameter_groups(model, cell, named=isinstance(cell, cells.RuleCell), elsewhere=elsewhere)
    if isinstance(cell, cells.LibraryOptimizer):
        given = {"max_norm": max_norm, "max_value": max_value, "reduce": reduce, **options}
        if refused := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{type(cell).__name__} takes no {refused[0]}: it is {cell.library}'s own optimizer, "
                             "and the loop clips its gradients (collie_lab.optim.clip_gradients)")
        for group in groups:
            for parameter in group["params"]:
                release(parameter)
        return build_library_optimizer(cell, model, groups)
    if cell.in_backward and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError("DistributedDataParallel averages gradients after an optimizer in backward has used them: "
                         "replicas drift apart. Leave it out, and give `reduce`")
    if not isinstance(cell, cells.RuleCell):
        raise TypeError(f"no optimizer for the cell {type(cell).__name__}")
    rule, hyper = build_rule(cell)
    return RuleOptimizer(groups, rule, in_backward=cell.in_backward, max_norm=max_norm, max_value=max_value,
                         clip_by=cell.clip_by, accumulate=cell.accumulate, rounding=cell.rounding, reduce=reduce,
                         **hyper, **options)


def build_rule(cell: cells.RuleCell) -> tuple[Rule, dict[str, Any]]:
    """The rule of a cell and its hyper-parameters."""
    rule: Rule
    match cell:
        case cells.AdamW():
            rule = AdamW()
        case cells.SGD():
            rule = SGD(momentum=cell.momentum > 0, nesterov=cell.nesterov)
        case cells.Lomo():
            rule = SGD()
        case cells.Lion():
            rule = Lion()
        case cells.Adan():
            rule = Adan(proximal=cell.proximal)
        case cells.Sophia():
            rule = SophiaG()
        case cells.AdaLomo():
            rule = AdaLomo()
        case _:
            raise TypeError(f"no rule for the cell {type(cell).__name__}")
    return rule, {name: getattr(cell, name) for name in ("lr", "weight_decay", *rule.hyper)}
