"""The learning rate over the steps."""

from __future__ import annotations

import math

from collie_lab.cells import Training

__all__ = ["learning_rate_factor"]


def learning_rate_factor(training: Training, step: int) -> float:
    """The share of the peak learning rate at `step`, counted from 1.

    It rises linearly over the warm-up, reaching its peak in the first step after it, and falls to `final_lr`
    in the last step: linearly, or along half a cosine (Loshchilov & Hutter, arXiv 1608.03983).
    """
    warmup = training.warmup_steps
    if step <= warmup:
        return step / (warmup + 1)
    if training.schedule == "constant":
        return 1.0
    progress = (step - 1 - warmup) / max(1, training.steps - 1 - warmup)
    fall = progress if training.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - training.final_lr) * fall
