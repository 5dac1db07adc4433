"""Every rule against the float64 oracle: prescribed gradients, a changing learning rate, rows of zeros, decay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from collie_lab.optim import RuleOptimizer
from tests.optim import oracle
from tests.optim.rules import RULES

SHAPES = ((), (5,), (4, 3), (2, 4, 3))
TOKENS = 3


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", RULES)
def test_twenty_steps(name: str, dtype: torch.dtype, tolerance: float, in_backward: bool) -> None:
    rule, hyper = RULES[name]
    rng = np.random.default_rng(0)
    # Numbers that fp32 holds, so that both sides start from the same.
    expected = _draw(rng)
    weights = [nn.Parameter(torch.tensor(value, dtype=dtype)) for value in expected]
    optimizer = RuleOptimizer(weights, rule, in_backward=in_backward, **hyper)
    memory: list[dict[str, Any]] = [{} for _ in SHAPES]
    for step in range(1, 21):
        lr = optimizer.param_groups[0]["lr"] = 0.01 * (1 + np.sin(step))
        gradients = _gradients(rng, step)
        _backward(weights, gradients)
        optimizer.step()
        optimizer.zero_grad()
        expected = [oracle.STEPS[name](value, gradient, state, step, lr, hyper)
                    for value, gradient, state in zip(expected, gradients, memory, strict=True)]
        if name == "sophia" and step % 3 == 1:
            sampled = _gradients(rng, 0)
            with optimizer.refresh_hessian(TOKENS):
                _backward(weights, sampled)
            for gradient, state in zip(sampled, memory, strict=True):
                oracle.sophia_refresh(gradient, state, TOKENS, hyper)
    for value, weight in zip(expected, weights, strict=True):
        assert weight.grad is None
        np.testing.assert_allclose(weight.detach().double().numpy(), value, rtol=0, atol=tolerance)


def test_sophia_reports_the_unclipped_share() -> None:
    rule, hyper = RULES["sophia"]
    weight = nn.Parameter(torch.zeros(4))
    optimizer = RuleOptimizer([weight], rule, **hyper)
    with optimizer.refresh_hessian(tokens=100):  # h = .01 · 100 · ĝ² = ĝ², ρh = .04
        weight.sum().backward()
    (weight * torch.tensor([0.1, 1.0, 2.0, 0.0])).sum().backward()  # m = .035 g
    optimizer.step()
    assert optimizer.unclipped_share().item() == 0.75
    torch.testing.assert_close(weight.detach(), -0.01 * torch.tensor([0.0035 / 0.04, 0.035 / 0.04, 1.0, 0.0]))


def test_sophia_without_hessian_warns() -> None:
    rule, hyper = RULES["sophia"]
    weight = nn.Parameter(torch.zeros(2))
    optimizer = RuleOptimizer([weight], rule, **{**hyper, "hessian_every": 2})
    weight.grad = torch.ones(2)
    for _ in range(5):
        optimizer.step()
    with pytest.warns(UserWarning, match="not refreshed"):
        optimizer.step()


def test_restart_is_a_new_optimizer() -> None:
    rule, hyper = RULES["adan"]
    ends = []
    for restarted in (True, False):
        weight = nn.Parameter(torch.ones(3))
        optimizer = RuleOptimizer([weight], rule, **hyper)
        for step in range(6):
            if step == 3:
                if restarted:
                    optimizer.restart()
                else:
                    optimizer = RuleOptimizer([weight], rule, **hyper)
            weight.grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
            optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", RULES)
def test_weights_of_any_layout(name: str) -> None:
    """A transposed weight, with a gradient laid out in another way, moves as a contiguous one does."""
    rule, hyper = RULES[name]
    source = torch.Generator().manual_seed(0)
    value = torch.randn(3, 5, generator=source)
    plain, turned = nn.Parameter(value.t().contiguous()), nn.Parameter(value.t())
    optimizer = RuleOptimizer([plain, turned], rule, **hyper)
    for _ in range(3):
        gradient = torch.randn(5, 3, generator=source)
        plain.grad, turned.grad = gradient.clone(), gradient.clone()
        optimizer.step()
    torch.testing.assert_close(plain, turned, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_nan_is_not_hidden(name: str) -> None:
    """A gradient that is NaN shows in the weight: torch.sign would make it 0, and the weight would rest for ever."""
    rule, hyper = RULES[name]
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = RuleOptimizer([weight], rule, **hyper)
    weight.grad = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    optimizer.step()
    assert weight[0, 1].isnan()


def _draw(rng: np.random.Generator) -> list[oracle.Array]:
    return [np.asarray(rng.normal(size=shape), dtype=np.float32).astype(np.float64) for shape in SHAPES]


def _gradients(rng: np.random.Generator, step: int) -> list[oracle.Array]:
    gradients = _draw(rng)
    if step % 4 == 1:  # rows that are 0, first or later; a whole tensor
        gradients[2][1] = 0.0
        gradients[3][:, 0] = 0.0
    if step == 6:
        gradients[1][:] = 0.0
    return gradients


def _backward(weights: list[nn.Parameter], gradients: list[Any]) -> None:
    total: Tensor = sum(((weight * torch.tensor(gradient, dtype=weight.dtype)).sum()
                         for weight, gradient in zip(weights, gradients, strict=True)), torch.zeros(()))
    total.backward()
