"""A second oracle: what torch, pytorch_optimizer and optimi make of the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from collie_lab.optim import SGD, AdaLomo, AdamW, Adan, Lion, Rule, RuleOptimizer

SHAPES = ((5,), (4, 3), (2, 4, 3))
COMMON: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
ADAN: dict[str, Any] = {**COMMON, "betas": (0.98, 0.92, 0.99), "eps": 1e-8}


def _pytorch_optimizer(name: str, **options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    def make(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        library = pytest.importorskip("pytorch_optimizer")
        optimizer: torch.optim.Optimizer = getattr(library, name)(weights, **options)
        return optimizer

    return make


def _optimi(name: str, **options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    def make(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(pytest.importorskip("optimi"), name)(weights, **options)
        return optimizer

    return make


ADAMW: dict[str, Any] = {**COMMON, "betas": (0.9, 0.999), "eps": 1e-8}
LION: dict[str, Any] = {**COMMON, "betas": (0.9, 0.99)}
MOMENTUM: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0, "momentum": 0.9}
PAIRS: dict[str, tuple[Rule, dict[str, Any], Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = {
    "torch AdamW": (AdamW(), ADAMW, lambda weights: torch.optim.AdamW(weights, **ADAMW)),
    # Without momentum, decay in the gradient and decoupled decay are one.
    "torch SGD": (SGD(), COMMON, lambda weights: torch.optim.SGD(weights, lr=0.01, weight_decay=0.1)),
    "torch momentum": (SGD(momentum=True), MOMENTUM, lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9)),
    "torch Nesterov": (SGD(momentum=True, nesterov=True), MOMENTUM,
                       lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9, nesterov=True)),
    "pytorch_optimizer Lion": (Lion(), LION, _pytorch_optimizer("Lion", **LION)),
    "pytorch_optimizer Adan": (Adan(), ADAN, _pytorch_optimizer("Adan", **ADAN)),
    "pytorch_optimizer Adan, not proximal": (
        Adan(proximal=False), ADAN, _pytorch_optimizer("Adan", weight_decouple=True, **ADAN)),
    "optimi Lion": (Lion(), LION, _optimi("Lion", **LION)),
    "optimi Adan": (Adan(), ADAN, _optimi("Adan", **ADAN)),
    "optimi AdamW": (AdamW(), ADAMW, _optimi("AdamW", **ADAMW)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_twenty_steps(name: str) -> None:
    rule, hyper, library = PAIRS[name]
    weights, others = _weights(torch.float64), _weights(torch.float64)
    ours, theirs = RuleOptimizer(weights, rule, **hyper), library(others)
    for step in range(20):
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.01 / (1 + step)
        for weight, other, gradient in zip(weights, others, _gradients(step), strict=True):
            weight.grad, other.grad = gradient, gradient.clone()
        ours.step()
        theirs.step()
    _assert_close(weights, others, 1e-12)


def test_adafactor_is_adalomo() -> None:
    """Apart from its cap of the learning rate at 1/√t, which lies above ours."""
    weights, others = _weights(torch.float64), _weights(torch.float64)
    ours = RuleOptimizer(weights, AdaLomo(), lr=0.01, weight_decay=0.0)
    theirs = torch.optim.Adafactor(others, lr=0.01, eps=(1e-30, 1e-3), d=1.0, weight_decay=0.0, beta2_decay=-0.8)
    for step in range(20):
        lr = ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.01 / (1 + step)
        assert lr < (1 + step) ** -0.5
        for weight, other, gradient in zip(weights, others, _gradients(step), strict=True):
            weight.grad, other.grad = gradient, gradient.clone()
        ours.step()
        theirs.step()
    _assert_close(weights, others, 1e-12)


@pytest.mark.parametrize(("name", "rule", "decay"), [("AdaLOMO", AdaLomo(), 0.1), ("LOMO", SGD(), 0.0)])
def test_in_backward(name: str, rule: Rule, decay: float) -> None:
    """pytorch_optimizer's, which compute in fp32 and know two dimensions at most; its LOMO ignores weight decay."""
    library = pytest.importorskip("pytorch_optimizer")
    ours_model, model = _Linear(), _Linear()
    options = {"weight_decay": decay} if name == "AdaLOMO" else {}
    theirs = getattr(library, name)(model, lr=0.01, **options)
    hyper: dict[str, Any] = {"lr": 0.01, "weight_decay": decay}
    ours = RuleOptimizer(ours_model.parameters(), rule, in_backward=True, **hyper)
    for step in range(20):
        lr = ours.param_groups[0]["lr"] = 0.01 / (1 + step)
        ours_model(step).backward()
        ours.step()
        theirs.fused_backward(model(step), lr)
    _assert_close(ours_model.parameters(), model.parameters(), 2e-6)


class _Linear(nn.Module):
    """A loss that is linear in the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(_weights(torch.float32)[:2])

    def forward(self, step: int) -> Tensor:
        total = torch.zeros(())
        for weight, gradient in zip(self.weights, _gradients(step)[:2], strict=True):
            total = total + (weight * gradient.float()).sum()
        return total


def _weights(dtype: torch.dtype) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in SHAPES]


def _gradients(step: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=source).double() for shape in SHAPES]


def _assert_close(ones: Iterable[Tensor], others: Iterable[Tensor], tolerance: float) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=tolerance)
