"""All rules with hyper-parameters that tests share, large enough to see every term."""

from __future__ import annotations

from typing import Any

from collie_lab.optim import SGD, AdaLomo, AdamW, Adan, Lion, Rule, SophiaG

COMMON: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
ADAN: dict[str, Any] = {**COMMON, "betas": (0.98, 0.92, 0.99), "eps": 1e-8}

RULES: dict[str, tuple[Rule, dict[str, Any]]] = {
    "sgd": (SGD(), COMMON),
    "momentum": (SGD(momentum=True), {**COMMON, "momentum": 0.9}),
    "nesterov": (SGD(momentum=True, nesterov=True), {**COMMON, "momentum": 0.9}),
    "adamw": (AdamW(), {**COMMON, "betas": (0.9, 0.999), "eps": 1e-8}),
    "lion": (Lion(), {**COMMON, "betas": (0.9, 0.99)}),
    "adan": (Adan(), ADAN),
    "adan_not_proximal": (Adan(proximal=False), ADAN),
    "sophia": (SophiaG(), {**COMMON, "betas": (0.965, 0.99), "rho": 0.04, "hessian_every": 10}),
    "adalomo": (AdaLomo(), COMMON),
}
