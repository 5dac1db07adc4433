"""The CUDA kernels without a GPU: computed by Triton's interpreter, and compiled for one.

Triton decides at its import whether it interprets or compiles, so each happens in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import NumpyVersion

from collie_lab.optim import AdaLomo, Rule
from tests.optim.rules import RULES

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
ROUNDINGS = ("exact", "stochastic", "kahan", "master")
# What AdaLomo's last pass reads; the other rules read and write their states.
FACTORS = (("row", "column"), ("column", "row"), ("shrink", "number"))


def _run(function: str, tmp_path: Path, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"from tests.optim.test_kernels import {function}; {function}()"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.skipif(NumpyVersion(np.__version__) >= "2.4.0" and NumpyVersion(triton.__version__) < "3.7.0",
                    reason="Triton 3.6's interpreter takes an array of one number for a number, as numpy 2.4 does not")
def test_interpreted_kernels_equal_eager(tmp_path: Path) -> None:
    _run("interpret", tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_an_h200(tmp_path: Path) -> None:
    _run("compile_for_h200", tmp_path, TRITON_INTERPRET="0")


def test_sources_are_python() -> None:
    from collie_lab.optim.kernels import kernel_source

    for rule, rounding, operands, scalars in _kernels():
        for many in (False, True):
            compile(kernel_source(rule, rounding, operands, scalars, many=many), "kernel", "exec")


def test_an_unknown_function_is_refused() -> None:
    from collie_lab.optim.kernels import kernel_source

    class Cubic(AdaLomo):
        def update(self, weight: Any, gradient: Any, states: Any, scalars: Any) -> Any:
            return torch.erf(weight), {}

    with pytest.raises(TypeError, match=r"Cubic\.update uses .*erf"):
        kernel_source(Cubic(), "exact", (), (), many=False)


def _kernels() -> Iterator[tuple[Rule, str, tuple[tuple[str, str], ...], tuple[str, ...]]]:
    for rule, hyper in RULES.values():
        states = tuple((name, "full") for name in rule.init(torch.zeros(2)))
        operands, scalars = (FACTORS, ()) if isinstance(rule, AdaLomo) else (states, tuple(rule.scalars(hyper, 1)))
        for rounding in ROUNDINGS:
            yield rule, rounding, operands, scalars


def _some_of_each() -> Iterator[tuple[Rule, str, tuple[tuple[str, str], ...], tuple[str, ...]]]:
    """Every rule with Kahan's compensation, and every rounding with one of the rules."""
    first = next(iter(RULES.values()))[0]
    for kernel in _kernels():
        if kernel[1] == "kahan" or kernel[0] is first:
            yield kernel


# --- in a process of their own ------------------------------------------------------------------------


def interpret() -> None:
    from collie_lab.optim import kernels
    from collie_lab.optim.engine import Eager
    from collie_lab.optim.rounding import Weight
    from collie_lab.optim.rule import Gradient
    from collie_lab.testing.optimizers import KINDS, check_engine

    calls: list[bool] = []
    build = kernels.build_kernel

    def counted(*names: Any, many: bool) -> Any:
        calls.append(many)
        return build(*names, many=many)

    kernels.build_kernel = counted  # type: ignore[assignment]
    kinds = [kind for kind in KINDS if kind[0] != torch.float64]
    for name, (rule, hyper) in RULES.items():
        steps = 2 if name == "adan" else 1  # Adan's first step leaves out terms
        check_engine(rule, hyper, "triton", kinds, steps=steps, truncates=True)
        _check_alone(rule, hyper)
    assert set(calls) == {True, False}, "nothing reached the kernels"
    _check_other_types()

    device = torch.device("cpu")
    triton, eager = kernels.Triton(device), Eager(device)
    source = torch.Generator().manual_seed(0)
    kinds_of_weights = ((torch.float32, "exact"), (torch.bfloat16, "kahan"), (torch.bfloat16, "master"),
                        (torch.bfloat16, "stochastic"))
    for shape, (m, n) in enumerate(((1, 1), (1, 300), (33, 1), (16, 256), (17, 257), (150, 300))):
        for kind, (dtype, rounding) in enumerate(kinds_of_weights):
            tensor = torch.randn(m, n, generator=source).to(dtype)
            extra = {"kahan": 1e-3 * torch.randn(m, n, generator=source).bfloat16(),
                     "master": torch.randn(m, n, generator=source)}.get(rounding)
            weight = Weight(tensor, rounding, extra)
            raw = torch.randn(m, n, generator=source).to(dtype)
            # Every shape meets every way to clip, and so does every kind of weight, with some of the others.
            scale, limit = ((None, None), (0.3, None), (None, 0.2), (0.3, 0.2))[(shape + kind) % 4]
            gradient = Gradient(raw, None if scale is None else torch.tensor(scale), limit)
            for one, other in zip(triton.moments(weight, gradient), eager.moments(weight, gradient), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            row, column = torch.rand(m, generator=source), torch.rand(n, generator=source)
            torch.testing.assert_close(triton.energy(gradient, row, column, torch.float32),
                                       eager.energy(gradient, row, column, torch.float32), rtol=1e-5, atol=1e-6)


def test_a_kernel_is_started_again_as_it_was_compiled() -> None:
    """Without Triton's look-up: by its constants, and by how its tensors lie in memory."""
    from collie_lab.optim.table import Launches

    told: list[Any] = []

    class Kernel:
        arg_names = ("table", "rate", "FIRST", "SECOND")  # SECOND has a default

        def __getitem__(self, grid: Any) -> Any:
            def start(*arguments: Any, **constants: Any) -> Any:
                told.append((grid, constants))
                return {(programs, 1, 1): lambda *again: told.append(again) for programs in (3, 4)}

            return start

    launches, kernel, table = Launches(), Kernel(), torch.zeros(8)
    launches(kernel, 2, (table, 0.5), FIRST=True)
    launches(kernel, 3, (table, 0.25), FIRST=True)
    assert told == [((2,), {"num_warps": 4, "FIRST": True}), (table, 0.25, None, None)]
    launches(kernel, 3, (table, 0.5), FIRST=False)
    launches(kernel, 3, (table[1:], 0.5), FIRST=False)
    launches(kernel, 4, (table[1:], 0.5), FIRST=False)
    launches(kernel, 4, (table[1:].double(), 0.5), FIRST=False)  # numbers of another type
    assert [len(call) for call in told] == [2, 4, 2, 2, 4, 2]


@dataclass(frozen=True)
class Half(Rule):
    """A state in bf16, which a table's addresses cannot tell from fp32."""

    def init(self, weight: Any) -> Any:
        return {"m": torch.zeros_like(weight, dtype=torch.bfloat16)}

    def scalars(self, group: Any, step: int) -> Any:
        return {"lr": group["lr"]}

    def update(self, weight: Any, gradient: Any, states: Any, scalars: Any) -> Any:
        m = states["m"] * 0.5 + gradient
        return weight - m * scalars["lr"], {"m": m}


def _check_other_types() -> None:
    from collie_lab.optim import RuleOptimizer

    sides = []
    for engine in ("eager", "triton"):
        source = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3000, generator=source)) for _ in range(3)]
        optimizer = RuleOptimizer(weights, Half(), engine=engine, lr=0.1, weight_decay=0.0)
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.randn(3000, generator=source)
            optimizer.step()
        sides.append(torch.cat(weights))
    torch.testing.assert_close(*sides, atol=2e-3, rtol=0)  # the interpreter cuts fp32 to bf16 where hardware rounds


def _check_alone(rule: Rule, hyper: Any) -> None:
    """A tensor is updated alike alone, as in backward, and together with others."""
    from collie_lab.optim import RuleOptimizer

    source = torch.Generator().manual_seed(0)
    shapes = ((140, 33), (7,), (3, 300), ())
    values, gradients = ([torch.randn(shape, generator=source) for shape in shapes] for _ in range(2))
    together, alone = ([torch.nn.Parameter(value.bfloat16()) for value in values] for _ in range(2))
    for weight, other, gradient in zip(together, alone, gradients, strict=True):
        weight.grad, other.grad = gradient.bfloat16(), gradient.bfloat16()
    for some in (together, *([weight] for weight in alone)):
        RuleOptimizer(some, rule, engine="triton", rounding="kahan", **hyper).step()
    for weight, other in zip(together, alone, strict=True):
        assert torch.equal(weight, other)


def compile_for_h200() -> None:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from collie_lab.optim import factored, kernels

    def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature=signature,
                           constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()})
        ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert ".target sm_90" in ptx
        return ptx

    clipped = {"SCALED": True, "LIMITED": True}
    numbers = {"limit": "fp32", "noise": "i32", "n": "i32", "width": "i32", "table_ptr": "*i64", "owner_ptr": "*i32",
               **dict.fromkeys(("beta", "fresh", "lr", "weight_decay"), "fp32")}
    for rule, rounding, operands, scalars in _some_of_each():
        tile = {"BLOCK": kernels._BLOCK, "COLUMNS": kernels._COLUMNS}
        half = "*fp32" if rounding == "exact" else "*bf16"
        extra = "*fp32" if rounding == "master" else half
        types = {**numbers, **{f"s_{name}": "fp32" for name in scalars}}
        if rounding == "kahan":  # one for one tensor differs in its head only
            compiled(kernels.build_kernel(rule, rounding, operands, scalars, many=False),
                     {**types, "w_ptr": half, "e_ptr": extra, "g_ptr": half}, {**clipped, **tile})
        ptx = compiled(kernels.build_kernel(rule, rounding, operands, scalars, many=True), types,
                       {**clipped, **tile, **_types(half, extra), "FIELDS": 7 + len(operands), "ALIGNED": True})
        assert "ld.global.v4.b32" in ptx, "a thread loads less than 16 bytes at once"
    for rounding in ROUNDINGS:
        half = "*fp32" if rounding == "exact" else "*bf16"
        flags = {"KAHAN": rounding == "kahan", "MASTER": rounding == "master", **clipped,
                 **_types(half, "*fp32" if rounding == "master" else half)}
        block = {"DOWN": factored.DOWN, "ACROSS": factored.ACROSS}
        assert "ld.global.v4.b32" in compiled(factored._moments, numbers, {
            **flags, **block, "STEP": factored.STEP, "ALIGNED": True})
        compiled(factored._vectors, numbers, {**flags, "LONG": factored.LONG})
    for whole in (True, False):
        assert "ld.global.v4.b32" in compiled(factored._energy, numbers, {
            **clipped, "G": tl.bfloat16, "ROWS": factored.ROWS, "COLUMNS": factored.COLUMNS, "ALIGNED": True,
            "WHOLE": whole, "WIDE": factored.WIDE})
    compiled(factored._means, numbers, {**block, "DEEP": factored.DEEP, "WIDE": factored.WIDE})
    compiled(factored._sizes, numbers, {
        **block, "ROWS": factored.ROWS, "WIDE": factored.WIDE, "LONG": factored.LONG})


def _types(weight: str, extra: str) -> dict[str, Any]:
    import triton.language as tl

    types = {"*fp32": tl.float32, "*bf16": tl.bfloat16}
    return {"W": types[weight], "E": types[extra], "G": types[weight]}
