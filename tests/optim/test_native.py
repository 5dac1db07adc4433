"""The C++ loops against the eager engine, and how they are built and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from collie_lab.optim import SGD, RuleOptimizer, native
from collie_lab.optim.engine import Eager, choose_engine
from collie_lab.optim.rounding import Weight
from collie_lab.optim.rule import Gradient, Rule
from collie_lab.testing.optimizers import KINDS, check_engine
from tests.optim.rules import RULES

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


class _Side:
    """Some weights, one of which begins in the middle of a page, and their optimizer."""

    def __init__(self, rule: Rule, hyper: dict[str, Any], engine: str):
        source = torch.Generator().manual_seed(0)
        memory = torch.randn(75 * 75 + 3, generator=source)
        self.weights = [nn.Parameter(memory[3:].view(75, 75)), nn.Parameter(torch.randn(40, 33, generator=source)),
                        nn.Parameter(torch.randn(5000, generator=source))]
        self.optimizer = RuleOptimizer(self.weights, rule, engine=engine, **hyper)


@pytest.mark.parametrize("name", RULES)
def test_equals_eager(name: str) -> None:
    check_engine(*RULES[name], "native", KINDS)


def test_reductions_equal_torch_in_float64() -> None:
    engine, source = native.Native(CPU), torch.Generator().manual_seed(0)
    for m, n in ((1, 1), (1, 300), (33, 1), (17, 257), (400, 300)):
        w, g = torch.randn(2, m, n, generator=source, dtype=torch.float64)
        row, column = torch.rand(m, generator=source).double(), torch.rand(n, generator=source).double()
        gradient = Gradient(g, torch.tensor(0.3), 0.2)
        q = (g * torch.tensor(0.3)).clamp(-0.2, 0.2)
        moments = engine.moments(Weight(w), gradient)
        for found, expected in zip(moments, ((q * q).sum(1), (q * q).sum(0), (w * w).sum()), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        u = q * row[:, None] * column
        torch.testing.assert_close(engine.energy(gradient, row, column, torch.float64), (u * u).sum())


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])  # loops that fetch ahead by pages, and one that does not
def test_threads_change_nothing_but_the_order_of_sums(name: str) -> None:
    rule, hyper = RULES[name]
    source = torch.Generator().manual_seed(0)
    weight, raw = torch.randn(2, 300, 701, generator=source)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            engine, tensor, states = native.Native(CPU), weight.clone(), rule.init(weight)
            engine.elementwise(rule, Weight(tensor), Gradient(raw), states, rule.scalars(hyper, 1))
            results.append((tensor, *engine.moments(Weight(weight), Gradient(raw))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        for one, two in zip(results[0][1:], other[1:], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_adalomo_is_the_same_by_any_number_of_threads() -> None:
    rule, hyper = RULES["adalomo"]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            source = torch.Generator().manual_seed(0)
            weights = [nn.Parameter(torch.randn(shape, generator=source)) for shape in ((300, 701), (5, 7), (701,))]
            optimizer = RuleOptimizer(weights, rule, engine="native", **hyper)
            for _ in range(3):
                for weight in weights:
                    weight.grad = torch.randn(weight.shape, generator=source)
                optimizer.step()
            results.append([*weights, *[state for weight in weights for state in optimizer.state[weight].values()]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6)


def test_what_no_loop_takes_is_updated_beside_the_others() -> None:
    for name in ("adamw", "adalomo"):
        rule, hyper = RULES[name]
        sides = []
        for engine in ("eager", "native"):
            source = torch.Generator().manual_seed(0)
            weights = [nn.Parameter(torch.randn(shape, generator=source)) for shape in ((6, 4), (4, 6), (5,), (0, 3))]
            weights[1].data = weights[1].data.T  # not contiguous
            optimizer = RuleOptimizer(weights, rule, engine=engine, **hyper)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=source)
            optimizer.step()
            sides.append(weights)
        for one, two in zip(*sides, strict=True):
            torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "adalomo"])
def test_what_is_kept_of_tensors_goes_when_they_move(name: str) -> None:
    """Step by step as the eager engine, whatever has been done to tensors in between."""
    rule, hyper = RULES[name]
    sides, source = [_Side(rule, hyper, engine) for engine in ("eager", "native")], torch.Generator().manual_seed(1)

    def transpose_a_gradient(side: _Side) -> None:
        side.weights[0].grad = side.weights[0].grad.T.contiguous().T  # type: ignore[union-attr]

    def drop_a_gradient(side: _Side) -> None:
        side.weights[1].grad = None

    def drop_another(side: _Side) -> None:
        side.weights[2].grad = None

    def change_the_type_of_a_gradient(side: _Side) -> None:
        weight = side.weights[0]
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        if hasattr(weight, "grad_dtype"):  # from torch 2.10 on
            weight.grad_dtype = torch.bfloat16
        weight.grad = gradient.to(getattr(weight, "grad_dtype", weight.dtype))

    def move_a_weight(side: _Side) -> None:
        side.weights[1].data = side.weights[1].data.clone()

    def transpose_a_weight(side: _Side) -> None:
        side.weights[0].data = side.weights[0].data.T  # the same memory and shape

    def move_the_states(side: _Side) -> None:
        for weight in side.weights:
            for state in side.optimizer.state[weight].values():
                state.data = state.data.clone()

    def restart(side: _Side) -> None:
        side.optimizer.restart()

    for step, change in enumerate((
            None, None, transpose_a_gradient, None, drop_a_gradient, drop_another, None, move_a_weight, move_the_states,
            restart, change_the_type_of_a_gradient, None, transpose_a_weight, None), 1):
        gradients = [torch.randn(weight.shape, generator=source) for weight in sides[0].weights]
        for side in sides:
            for weight, gradient in zip(side.weights, gradients, strict=True):
                weight.grad = gradient.to(getattr(weight, "grad_dtype", weight.dtype), copy=True)
            if change is not None:
                change(side)
            side.optimizer.step()
            assert side.optimizer.state[side.weights[0]]["step"] == step
        for one, two in zip(*[side.weights for side in sides], strict=True):
            torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6)


def test_a_weight_that_became_smaller_where_it_was_is_seen() -> None:
    memory = torch.ones(6, 5)
    weight = nn.Parameter(memory)
    optimizer = RuleOptimizer([weight], SGD(), lr=0.5, weight_decay=0.0)
    for rows in (6, 2, 6):
        weight.grad = None
        weight.data = memory[:rows]
        weight.grad = torch.ones(rows, 5)
        optimizer.step()
    assert memory[:, 0].tolist() == [-0.5, -0.5, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weights_may_begin_at_any_byte(name: str) -> None:
    """As those that are mapped from a file."""
    rule, hyper = RULES[name]
    results = []
    for offset in range(4):
        weight = nn.Parameter(torch.frombuffer(bytearray(4 * 5000 + 3), dtype=torch.float32, count=5000,
                                               offset=offset))
        optimizer = RuleOptimizer([weight], rule, engine="native", **hyper)
        weight.grad = torch.linspace(-1, 1, 5000)
        optimizer.step()
        results.append(weight.detach())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    assert results[0].abs().amax() > 0


def test_loops_are_built_once_and_kept(tmp_path: Path) -> None:
    code = ("import torch; from collie_lab import Lion, optim; model = torch.nn.Linear(3, 3); "
            "optimizer = optim.build(Lion(), model); model(torch.ones(3)).sum().backward(); optimizer.step()")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ages = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
        ages.append({file: file.stat().st_mtime_ns for file in (tmp_path / "collie_lab" / "kernels").iterdir()})
    assert len(ages[0]) == 2  # the rule's, and a trial of the compiler
    assert ages[0] == ages[1]


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        assert isinstance(choose_engine("auto", CPU), Eager)
