"""The deferred gradients of linear layers against autograd's."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from collie_lab.parallel.deferred import DeferredLinears


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_come_with_take(precision):
    """That of the input at once; those of a micro-batch with its own function, in any order."""
    inputs = [torch.randn(2, 5, 6, requires_grad=True) for _ in range(2)]
    expected_inputs, expected = [], None
    for defer in (False, True):
        model, linears = _model(), DeferredLinears()
        model[2].requires_grad_(False)
        if defer:
            linears.attach(model)
        later = []
        for x in inputs:
            x.grad = None
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
                out = model(x)
            out.float().square().sum().backward()
            later.append(linears.take())
        if not defer:
            expected, expected_inputs = _gradients(model), [x.grad for x in inputs]
            continue
        assert set(_gradients(model)) == {"3.weight", "3.bias"}
        for add in reversed(later):
            add()
        torch.testing.assert_close(_gradients(model), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close([x.grad for x in inputs], expected_inputs, rtol=0, atol=0)


def test_hooks_of_parameters_fire():
    """Optimizers in backward live on them."""
    model, linears = nn.Linear(2, 2), DeferredLinears()
    seen: list[Tensor] = []
    model.weight.register_post_accumulate_grad_hook(seen.append)
    linears.attach(model)
    model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    add = linears.take()
    assert not seen
    add()
    assert seen == [model.weight]
