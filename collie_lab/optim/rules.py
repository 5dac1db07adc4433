"""The element-wise rules, each after its paper; θ weight, g gradient, η learning rate, λ weight decay, t step.

m, v, n and h are exponential moving averages that start at zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from collie_lab.optim.rule import Group, Rule, Scalars, States, decay

__all__ = ["SGD", "Adan", "AdamW", "Lion", "SophiaG"]


@dataclass(frozen=True)
class SGD(Rule):
    """θ ← θ(1 − ηλ) − ηu with u = g, or with momentum m ← μm + g: u = m, or g + μm (Nesterov).

    In backward and without momentum it is LOMO (Lv et al., arXiv 2306.09782, algorithm 1). Unlike torch's, its
    weight decay is decoupled: the same without momentum.
    """

    momentum: bool = False
    nesterov: bool = False

    @property
    def hyper(self) -> tuple[str, ...]:  # type: ignore[override]
        """`momentum`, where there is one."""
        return ("momentum",) if self.momentum else ()

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Without momentum."""
        return not self.momentum

    @override
    def init(self, weight: Tensor) -> States:
        return {"momentum": torch.zeros_like(weight)} if self.momentum else {}

    @override
    def scalars(self, group: Group, step: int) -> Scalars:
        return {"decay": decay(group), "lr": group["lr"], **{name: group[name] for name in self.hyper}}

    @override
    def update(self, weight: Tensor, gradient: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
        kept, lr = scalars["decay"], scalars["lr"]
        if not self.momentum:
            return weight * kept - gradient * lr, {}
        mu = scalars["momentum"]
        m = states["momentum"] * mu + gradient
        u = gradient + m * mu if self.nesterov else m
        return weight * kept - u * lr, {"momentum": m}


@dataclass(frozen=True)
class AdamW(Rule):
    """θ ← θ(1 − ηλ) − η·(m/c₁) / (√(v/c₂) + ε), cᵢ = 1 − βᵢᵗ (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2)."""

    hyper: ClassVar[tuple[str, ...]] = ("betas", "eps")

    @override
    def init(self, weight: Tensor) -> States:
        return {"m": torch.zeros_like(weight), "v": torch.zeros_like(weight)}

    @override
    def scalars(self, group: Group, step: int) -> Scalars:
        b1, b2 = group["betas"]
        return {"decay": decay(group), "b1": b1, "a1": 1 - b1, "b2": b2, "a2": 1 - b2, "eps": group["eps"],
                "lr": group["lr"] / (1 - b1**step), "root": 1 / math.sqrt(1 - b2**step)}

    @override
    def update(self, weight: Tensor, gradient: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
        s = scalars
        m = states["m"] * s["b1"] + gradient * s["a1"]
        v = states["v"] * s["b2"] + gradient * gradient * s["a2"]
        return weight * s["decay"] - m * s["lr"] / (torch.sqrt(v) * s["root"] + s["eps"]), {"m": m, "v": v}


@dataclass(frozen=True)
class Lion(Rule):
    """θ ← θ(1 − ηλ) − η·sign(β₁m + (1−β₁)g), then m ← β₂m + (1−β₂)g (Chen et al., arXiv 2302.06675, algorithm 2)."""

    hyper: ClassVar[tuple[str, ...]] = ("betas",)

    @override
    def init(self, weight: Tensor) -> States:
        return {"m": torch.zeros_like(weight)}

    @override
    def scalars(self, group: Group, step: int) -> Scalars:
        b1, b2 = group["betas"]
        return {"decay": decay(group), "lr": group["lr"], "b1": b1, "a1": 1 - b1, "b2": b2, "a2": 1 - b2}

    @override
    def update(self, weight: Tensor, gradient: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
        s, m = scalars, states["m"]
        c = m * s["b1"] + gradient * s["a1"]
        u = torch.sign(c) + c * 0  # the sign of NaN would be 0, and hide it
        return weight * s["decay"] - u * s["lr"], {"m": m * s["b2"] + gradient * s["a2"]}


@dataclass(frozen=True)
class Adan(Rule):
    """Adaptive Nesterov momentum (Xie et al., arXiv 2208.06677, algorithm 1).

    With d = g − g₋₁ (0 in the first step) and kept factors β: m, v, n are averages of g, d and (g + β₂d)²;
    u = (m/c₁ + β₂·v/c₂) / (√(n/c₃) + ε), cᵢ = 1 − βᵢᵗ. Proximal: θ ← (θ − ηu) / (1 + ηλ); else
    θ ← θ(1 − ηλ) − ηu.
    """

    proximal: bool = True
    hyper: ClassVar[tuple[str, ...]] = ("betas", "eps")

    @override
    def init(self, weight: Tensor) -> States:
        return {name: torch.zeros_like(weight) for name in ("m", "v", "n", "previous")}

    @override
    def scalars(self, group: Group, step: int) -> Scalars:
        b1, b2, b3 = group["betas"]
        shrink = 1 / (1 + group["lr"] * group["weight_decay"]) if self.proximal else decay(group)
        return {"decay": shrink, "b1": b1, "a1": 1 - b1, "b2": b2, "a2": 1 - b2, "b3": b3, "a3": 1 - b3,
                "eps": group["eps"], "later": float(step > 1), "root": 1 / math.sqrt(1 - b3**step),
                "lr_m": group["lr"] / (1 - b1**step), "lr_v": group["lr"] * b2 / (1 - b2**step)}

    @override
    def update(self, weight: Tensor, gradient: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
        s = scalars
        d = (gradient - states["previous"]) * s["later"]
        look_ahead = gradient + d * s["b2"]
        m = states["m"] * s["b1"] + gradient * s["a1"]
        v = states["v"] * s["b2"] + d * s["a2"]
        n = states["n"] * s["b3"] + look_ahead * look_ahead * s["a3"]
        step = (m * s["lr_m"] + v * s["lr_v"]) / (torch.sqrt(n) * s["root"] + s["eps"])
        new = (weight - step) * s["decay"] if self.proximal else weight * s["decay"] - step
        return new, {"m": m, "v": v, "n": n, "previous": gradient}


@dataclass(frozen=True)
class SophiaG(Rule):
    """Second-order clipped momentum, Gauss-Newton-Bartlett (Liu et al., arXiv 2305.14342, algorithms 2 and 3).

    θ ← θ(1 − ηλ) − η·sign(m)·min(|m| / (ρh + 1e-15), 1). Now and then `refresh` takes the gradient ĝ of the mean
    loss over B tokens, their labels drawn from the model itself: h ← β₂h + (1−β₂)·B·ĝ². (The official code
    keeps ĝ² in h and B in the update: the same while B stays the same, and right when it does not.)
    """

    hyper: ClassVar[tuple[str, ...]] = ("betas", "rho", "hessian_every")

    @override
    def init(self, weight: Tensor) -> States:
        return {"m": torch.zeros_like(weight), "h": torch.zeros_like(weight)}

    @override
    def scalars(self, group: Group, step: int) -> Scalars:
        b1, _ = group["betas"]
        return {"decay": decay(group), "lr": group["lr"], "b1": b1, "a1": 1 - b1, "rho": group["rho"], "eps": 1e-15}

    @override
    def update(self, weight: Tensor, gradient: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
        s, h = scalars, states["h"]
        m = states["m"] * s["b1"] + gradient * s["a1"]
        ratio = torch.abs(m) / (h * s["rho"] + s["eps"])
        u = torch.sign(m) * torch.where(ratio > 1, 1, ratio)  # NaN stays NaN
        return weight * s["decay"] - u * s["lr"], {"m": m}

    def refresh(self, gradient: Tensor, states: States, group: Group, tokens: int) -> None:
        """Take the gradient of `tokens` sampled labels into h."""
        _, b2 = group["betas"]
        h = states["h"]
        h.mul_(b2).addcmul_(gradient.to(h.dtype), gradient.to(h.dtype), value=(1 - b2) * tokens)

    def unclipped(self, states: States, group: Group) -> Tensor:
        """How many elements move by less than the full learning rate (0-d)."""
        return (states["m"].abs() < states["h"] * float(group["rho"])).sum()
