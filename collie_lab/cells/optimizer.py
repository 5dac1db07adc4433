"""The optimizer cells: what to update with. The rules themselves live in `collie_lab.optim`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from collie_lab.cells._base import Cell

__all__ = ["SGD", "AdamW", "Lomo", "Optimizer"]


class Optimizer(Cell):
    """What all optimizer cells share. Weight decay spares norms, biases and embeddings."""

    in_backward: ClassVar[bool] = False
    """Whether parameters are updated during the backward pass, each gradient freed at once."""

    lr: float = Field(gt=0.0)
    """Peak learning rate; `Training.schedule` moves it."""
    weight_decay: float = Field(default=0.0, ge=0.0)


class AdamW(Optimizer):
    """Decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), torch's own implementation.

    The default learning rate is that of Stanford Alpaca's fine-tuning recipe for 7 B.
    """

    lr: float = Field(default=2e-5, gt=0.0)
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0)


class SGD(Optimizer):
    """Stochastic gradient descent, with optional momentum."""

    lr: float = Field(default=3e-2, gt=0.0)
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    nesterov: bool = False
    """Needs momentum."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")
        return self


class Lomo(Optimizer):
    """LOMO (Lv et al., arXiv 2306.09782): SGD inside the backward pass; no gradient outlives its update.

    θ ← θ(1 − ηλ) − ηg. The default learning rate is the paper's for LLaMA-7B.
    """

    in_backward: ClassVar[bool] = True

    lr: float = Field(default=3e-2, gt=0.0)
