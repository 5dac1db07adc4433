"""Cells of the optimizers that torch and optional libraries bring; they update after the backward pass."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from collie_lab.cells.optimizer import Beta, Optimizer

__all__ = ["Adafactor", "AdamW8bit", "Apollo", "GaLore", "LibraryOptimizer", "Muon", "ScheduleFree"]


class LibraryOptimizer(Optimizer):
    """What optimizers of libraries share: the library's own step, no update in backward.

    They round bf16 weights (`Training.weights`) to nearest, which loses updates below 1/500 of a weight: at the
    learning rates of fine-tuning, nearly all. AdamW8bit alone rounds at random.
    """

    kind: ClassVar[str] = ""
    library: ClassVar[str] = "torch"
    """What has to be installed, as `pip install` calls it."""
    package: ClassVar[str] = "torch"
    """What is imported."""
    shardable: ClassVar[bool] = True
    """Whether sharded parameters (`Parallel.zero`) get the updates that whole ones get."""
    why_whole: ClassVar[str] = ""
    """Why not, if not."""
    for_matrices: ClassVar[bool] = False
    """Whether it is for the 2-D weights of blocks, and has nothing to do where none of them is trained."""


class Adafactor(LibraryOptimizer):
    """Factored second moment (Shazeer & Stern, arXiv 1804.04235), torch's implementation and defaults.

    The learning rate is relative: at step t a matrix moves by its own RMS times the smaller of `lr` and 1/√t.
    """

    shardable: ClassVar[bool] = False
    why_whole: ClassVar[str] = "torch's Adafactor fails on sharded tensors"

    lr: float = Field(default=1e-2, gt=0.0)
    beta2_decay: float = Field(default=-0.8, lt=0.0)
    clip_threshold: float = Field(default=1.0, ge=1.0)
    """Largest RMS of an update (d)."""


class Muon(LibraryOptimizer):
    """Orthogonalized momentum for the matrices of the blocks, AdamW for the rest (Jordan et al. 2024).

    torch's implementation and defaults; the learning rate is that of AdamW for both, since the update is scaled to
    AdamW's RMS (Liu et al., arXiv 2502.16982). Matrices are the 2-D weights of the model's blocks; stacked experts
    (3-D) go by AdamW. The orthogonalization computes in bf16: shards move like whole matrices to about 2%.
    """

    for_matrices: ClassVar[bool] = True

    lr: float = Field(default=1e-3, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)
    momentum: Beta = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Newton-Schulz iterations."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Of AdamW, for embeddings, head, norms and biases."""


class GaLore(LibraryOptimizer):
    """AdamW on a low-rank projection of the gradient (Zhao et al., arXiv 2403.03507); package galore-torch.

    Projected are the 2-D weights of the blocks. Defaults of the authors' script for pre-training 60 M (lr, rank,
    update_proj_gap, scale) and of their class (betas, eps).
    """

    kind: ClassVar[str] = "galore"
    library: ClassVar[str] = "galore-torch"
    package: ClassVar[str] = "galore_torch"
    shardable: ClassVar[bool] = False
    why_whole: ClassVar[str] = "a checkpoint cannot keep its low-rank states of shards"
    for_matrices: ClassVar[bool] = True

    lr: float = Field(default=1e-2, gt=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-6, gt=0.0)
    rank: int = Field(default=128, ge=1)
    update_proj_gap: int = Field(default=200, ge=1)
    """Steps between two projections."""
    scale: float = Field(default=0.25, gt=0.0)


class Apollo(LibraryOptimizer):
    """AdamW's scaling from a random low-rank projection (Zhu et al., arXiv 2412.05270); package apollo-torch.

    Projected are the 2-D weights of the blocks. Defaults of the authors' manual (lr, rank for 1 B and 7 B, scale,
    update_proj_gap) and of their class (betas, eps).
    """

    library: ClassVar[str] = "apollo-torch"
    package: ClassVar[str] = "apollo_torch"
    shardable: ClassVar[bool] = False
    why_whole: ClassVar[str] = "apollo-torch cannot project sharded gradients"
    for_matrices: ClassVar[bool] = True

    lr: float = Field(default=1e-2, gt=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-6, gt=0.0)
    rank: int = Field(default=256, ge=1)
    """1 with `scale_type="tensor"` and `scale=128` is APOLLO-Mini."""
    scale: float = Field(default=1.0, gt=0.0)
    scale_type: Literal["channel", "tensor"] = "channel"
    update_proj_gap: int = Field(default=200, ge=1)


class ScheduleFree(LibraryOptimizer):
    """Schedule-Free AdamW (Defazio et al., arXiv 2405.15682); package schedulefree. Wants a constant schedule.

    The library's defaults. Checkpoints keep the point where it trains; evaluations and exports see the average.
    """

    library: ClassVar[str] = "schedulefree"
    package: ClassVar[str] = "schedulefree"

    lr: float = Field(default=2.5e-3, gt=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0)
    warmup_steps: int = Field(default=0, ge=0)
    """Its own warm-up, which its averages know of; leave `Training.warmup` at 0."""


class AdamW8bit(LibraryOptimizer):
    """AdamW with states of 8 bits, quantized in blocks (Dettmers et al., arXiv 2110.02861); package torchao.

    The default learning rate is AdamW's here, the rest is torchao's but for weight decay (theirs is .01). Tensors
    below 4096 elements, or of no whole number of blocks, keep full states. bf16 weights round at random.
    """

    kind: ClassVar[str] = "adamw8bit"
    library: ClassVar[str] = "torchao"
    package: ClassVar[str] = "torchao"
    shardable: ClassVar[bool] = False
    why_whole: ClassVar[str] = "torchao quantizes each shard on its own, and not at all where blocks do not fit"

    lr: float = Field(default=2e-5, gt=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0)
    block_size: int = Field(default=256, ge=1)
