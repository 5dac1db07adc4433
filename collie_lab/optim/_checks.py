"""What cannot be asked of a rule, or of the optimizer that applies it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collie_lab.optim.rounding import ROUNDINGS
from collie_lab.optim.rule import Rule

__all__ = ["check_names", "check_options"]


def check_options(rule: Rule, *, rounding: str, accumulate: str | None, max_norm: float | None,
                  max_value: float | None) -> None:
    """Raise `ValueError` for a combination that would be wrong; `accumulate` is None out of backward."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"unknown rounding {rounding!r}: one of {', '.join(ROUNDINGS)}")
    if accumulate == "each" and not rule.linear:
        raise ValueError(f"{type(rule).__name__} is not linear in the gradient: updates with parts of it "
                         'would move the weights several times too far. accumulate="hold", or in_backward=False')
    if accumulate and max_norm is not None:
        raise ValueError("the norm of an accumulated gradient is known only when all of it is there: "
                         "clip by value, or in_backward=False")
    if accumulate == "each" and max_value is not None:
        raise ValueError("the clipped parts of a gradient do not add up to the clipped whole: "
                         'accumulate="hold", or in_backward=False')


def check_names(rule: Rule, names: Mapping[str, Any], where: str, *, required: bool) -> None:
    """Raise `TypeError` for a hyper-parameter that the rule does not know, or one that is `required` and missing."""
    known = ("lr", "weight_decay", *rule.hyper)
    if unknown := [name for name in names if name not in known]:
        raise TypeError(f"{type(rule).__name__} has no hyper-parameter {unknown[0]!r}{where}; "
                        f"it has {', '.join(known)}")
    if required and (missing := [name for name in known if name not in names]):
        raise TypeError(f"{type(rule).__name__} needs {missing[0]!r}")
