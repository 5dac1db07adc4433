"""The learning rate over the steps."""

from __future__ import annotations

import math

from collie_lab.cells import Training

__all__ = ["learning_rate_factor"]


def learning_rate_factor(training: Training, step: int) -> float:
    """The share of the peak learning rate at `step`, counted from 1.

    It rises linearly over the warm-up, reaching its peak in the first step after it, and falls to `final_lr`
    in the last step: linearly, along half a cosine (Loshchilov & Hutter, arXiv 1608.03983), or with `wsd`
    linearly over the last steps.
    """
    warmup = training.warmup_steps
    if step <= warmup:
        return step / (warmup + 1)
    if training.schedule == "constant":
        return 1.0
    last_peak = warmup + 1
    if training.schedule == "wsd":
        last_peak = max(last_peak, training.steps - training.decay_steps)
    progress = max(0, step - last_peak) / max(1, training.steps - last_peak)
    fall = (1 - math.cos(math.pi * progress)) / 2 if training.schedule == "cosine" else progress
    return 1.0 - (1.0 - training.final_lr) * fall
