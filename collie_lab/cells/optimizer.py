"""The optimizer cells: what to update with. The rules themselves live in `collie_lab.optim`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from collie_lab.cells._base import Cell

__all__ = ["SGD", "AdaLomo", "AdamW", "Adan", "Lion", "Lomo", "Optimizer", "RuleCell", "Sophia"]

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Optimizer(Cell):
    """What all optimizer cells share."""

    in_backward: bool = False
    """Update each parameter in the backward pass as soon as its gradient is there, and free the gradient."""

    lr: float = Field(gt=0.0)
    """Peak learning rate; `Training.schedule` moves it."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: `matrices` spares norms, biases and embeddings."""
    lr_scale: Mapping[str, Annotated[float, Field(ge=0.0)]] = {}
    """Factors of the learning rate by patterns of parameter names: `{"*lora_B*": 16}`; the first match counts."""


class RuleCell(Optimizer):
    """What the optimizers of `collie_lab.optim` share: they run in backward, and keep bf16 weights well."""

    kind: ClassVar[str] = ""

    clip_by: Literal["two_passes", "previous_norm"] = "two_passes"
    """How `Training.clip_grad_norm` works in backward, where the norm must be known before the gradient is.
    `two_passes`: one more forward and backward pass finds it, exact. `previous_norm`: that of the step before."""
    accumulate: Literal["hold", "each"] | None = None
    """Several micro-batches a step, in backward. None: refused. `hold`: gradients pile up and the last
    micro-batch updates: exact, but they need their memory. `each`: every micro-batch updates with its part, for rules
    that are linear in the gradient (SGD, Lomo): no memory, but later micro-batches see weights that have moved."""
    rounding: Literal["stochastic", "kahan", "master"] | None = None
    """How bf16 weights (`Training.weights`) take small updates: by rounding at random, with a second bf16
    number, or with an fp32 copy. None: `stochastic` for Lomo and AdaLomo, else `master`."""


class AdamW(RuleCell):
    """Decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101).

    The default learning rate is that of Stanford Alpaca's fine-tuning recipe for 7 B, which does not decay either;
    betas and eps are torch's.
    """

    lr: float = Field(default=2e-5, gt=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0.0)


class SGD(RuleCell):
    """Stochastic gradient descent, with optional momentum; weight decay is decoupled.

    The default learning rate is that of the LOMO paper (arXiv 2306.09782) for LLaMA-7B.
    """

    lr: float = Field(default=3e-2, gt=0.0)
    momentum: Beta = 0.0
    nesterov: bool = False
    """Needs momentum."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")
        return self


class Lomo(RuleCell):
    """LOMO (Lv et al., arXiv 2306.09782): SGD inside the backward pass; no gradient outlives its update.

    θ ← θ(1 − ηλ) − ηg. The default learning rate is the paper's for LLaMA-7B.
    """

    in_backward: bool = True
    lr: float = Field(default=3e-2, gt=0.0)
    rounding: Literal["stochastic", "kahan", "master"] | None = "stochastic"


class AdaLomo(RuleCell):
    """AdaLomo (Lv et al., arXiv 2310.10195): Adafactor's factored second moment, no momentum, inside backward.

    The default learning rate is the paper's for instruction tuning of LLaMA. Its authors advise a warm-up over 3% of
    the steps, a linear decay, and no clipping by norm: the update is normalized tensor by tensor.
    """

    kind: ClassVar[str] = "adalomo"
    in_backward: bool = True
    lr: float = Field(default=5e-4, gt=0.0)


class Lion(RuleCell):
    """Sign of a momentum (Chen et al., arXiv 2302.06675).

    Defaults of the authors' code (google/automl). They advise a learning rate 3 to 10 times below AdamW's and a
    weight decay 3 to 10 times above.
    """

    lr: float = Field(default=1e-4, gt=0.0)
    betas: tuple[Beta, Beta] = (0.9, 0.99)


class Adan(RuleCell):
    """Adaptive Nesterov momentum (Xie et al., arXiv 2208.06677).

    Defaults of the authors' code (sail-sg/Adan), the betas as kept factors. They advise 5 to 10 times AdamW's
    learning rate; for instruction tuning 2 to 4 times, and a weight decay of .005.
    """

    lr: float = Field(default=1e-3, gt=0.0)
    betas: tuple[Beta, Beta, Beta] = (0.98, 0.92, 0.99)
    eps: float = Field(default=1e-8, gt=0.0)
    proximal: bool = True
    """Decay by dividing, θ ← (θ − ηu)/(1 + ηλ); else as AdamW does."""
    restart_every: int | None = Field(default=None, ge=1)
    """Steps after which all momenta start anew (the paper's restart condition)."""


class Sophia(RuleCell):
    """Sophia-G (Liu et al., arXiv 2305.14342): momentum, clipped by an estimate of the Hessian's diagonal.

    Every `hessian_every` steps the loop runs one more forward and backward pass, on labels that the model draws.
    Defaults of the authors' code (Liuhong99/Sophia). `unclipped_share` among the metrics should be between .1 and
    .5: raise `rho` where it is below, lower it where it is above.
    """

    lr: float = Field(default=1e-4, gt=0.0)
    weight_decay: float = Field(default=0.1, ge=0.0)
    betas: tuple[Beta, Beta] = (0.965, 0.99)
    rho: float = Field(default=0.04, gt=0.0)
    hessian_every: int = Field(default=10, ge=1)
