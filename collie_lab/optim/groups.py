"""Parameter groups: which parameters decay, and which learn at another pace."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from collie_lab.cells import Optimizer

__all__ = ["parameter_groups"]


def parameter_groups(model: nn.Module, cell: Optimizer, *, named: bool = False, elsewhere: Iterable[str] = ()
                     ) -> list[dict[str, Any]]:
    """The trained parameters in groups of one weight decay and one learning rate; `named`: as (name, parameter).

    Matrices decay; norms, biases and embeddings do not, unless `cell.decay` is "all". An embedding that is tied
    to the output head counts as an embedding. The first pattern of `cell.lr_scale` that matches a name decides.
    `elsewhere` names trained parameters that others have (the stages of a pipeline), for which patterns may be.

    Raises:
        ValueError: a pattern that matches no trained parameter, here or elsewhere.
    """
    embeddings = {id(parameter) for module in model.modules() if isinstance(module, nn.Embedding)
                  for parameter in module.parameters(recurse=False)}
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    unused = set(cell.lr_scale) - {_pattern(cell, name) for name in elsewhere}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = cell.decay == "all" or (parameter.ndim >= 2 and id(parameter) not in embeddings)
        pattern = _pattern(cell, name)
        unused -= {pattern}
        scale = 1.0 if pattern is None else cell.lr_scale[pattern]
        group = groups.setdefault((decays, scale), {
            "params": [], "weight_decay": cell.weight_decay if decays else 0.0, "lr": cell.lr * scale})
        group["params"].append((name, parameter) if named else parameter)
    if unused:
        raise ValueError(f"{type(cell).__name__}.lr_scale: no trained parameter's name matches {min(unused)!r}")
    # Decaying and unscaled first: the learning rate that is reported is that of the first group.
    return [groups[key] for key in sorted(groups, key=lambda key: (key[1] != 1.0, not key[0], key[1]))]


def _pattern(cell: Optimizer, name: str) -> str | None:
    """The pattern of `cell.lr_scale` that decides for a name, if any does."""
    return next((pattern for pattern in cell.lr_scale if fnmatchcase(name, pattern)), None)
