"""The training cell: how long, in what batches, at what precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from collie_lab.cells._base import Cell

__all__ = ["Training"]


class Training(Cell):
    """The loop's settings.

    `batch_size` counts sequences per optimizer step over all ranks, `micro_batch_size` those of one
    forward pass on one data-parallel rank; the rest is gradient accumulation.
    """

    steps: int = Field(default=100, ge=1)
    """Optimizer steps. The data are repeated, in a new order each epoch, as often as that needs;
    `exp.steps_for(epochs=3)` tells how many steps so many epochs are."""
    batch_size: int = Field(default=8, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Default: the whole share of a rank, without accumulation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: bfloat16 compute (autocast; FSDP2's mixed precision when sharded)."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """How weights are kept. `bf16` halves them and their gradients; the optimizer's `rounding` keeps their updates."""
    recompute: Literal["none", "full"] = "none"
    """`full`: every block recomputes its activations in the backward pass."""
    compile: bool = False
    """Have torch.compile make kernels of its own for every transformer block, while it trains: the same losses but for
    rounding (dropout draws other numbers). The first steps wait for the compiler, tens of seconds each; evaluation and
    generation run as before."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """How the learning rate falls after the warm-up, to `final_lr` times its peak. `wsd` (warm-up, stable, decay: Hu et
    al., arXiv 2404.06395) falls at the end alone, linearly: a checkpoint from before is one to train on."""
    warmup: float = Field(default=0.0, ge=0.0)
    """Below 1: a share of the steps; from 1 on: steps."""
    decay: float = Field(default=0.2, gt=0.0)
    """How long `wsd` falls. Below 1: a share of the steps; from 1 on: steps."""
    final_lr: float = Field(default=0.0, ge=0.0, le=1.0)
    clip_grad_norm: float | None = Field(default=None, gt=0.0)
    """Largest global gradient norm; the gradient is scaled down to it."""
    clip_grad_value: float | None = Field(default=None, gt=0.0)
    """Largest absolute value of a gradient's element, after `clip_grad_norm`."""
    seed: int = Field(default=0, ge=0)
    """Of the weights, the data order and dropout."""
    checkpoint_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; a run that is stopped writes one in any case."""
    keep_checkpoints: int = Field(default=2, ge=1)
    export: bool = True
    """Write the trained model to `<run>/model`: a transformers folder, or a peft folder with an adapter."""
    loss: Callable[..., Any] | None = None
    """`loss(logits, labels)`: fp32 logits [tokens, vocabulary] and labels [tokens] to losses [tokens].
    Default: cross-entropy."""

    @field_validator("warmup", "decay")
    @classmethod
    def _whole_steps(cls, value: float, info: ValidationInfo) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"from 1 on, {info.field_name} counts whole steps")
        return value

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises from zero."""
        return self._steps_of(self.warmup)

    @property
    def decay_steps(self) -> int:
        """Steps over which the learning rate falls at the end, with `wsd`."""
        return self._steps_of(self.decay)

    def _steps_of(self, length: float) -> int:
        return int(length) if length >= 1 else round(length * self.steps)
