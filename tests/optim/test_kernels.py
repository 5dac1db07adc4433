"""The CUDA kernels without a GPU: computed by Triton's interpreter, and compiled for one.

Triton decides at its import whether it interprets or compiles, so each happens in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from collie_lab.optim import AdaLomo, Rule
from tests.optim.rules import RULES

pytest.importorskip("triton")

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


def test_interpreted_kernels_equal_eager(tmp_path: Path) -> None:
    _run("interpret", tmp_path, TRITON_INTERPRET="1")


def test_kernels_compile_for_an_h200(tmp_path: Path) -> None:
    _run("compile_for_h200", tmp_path, TRITON_INTERPRET="0")


def test_sources_are_python() -> None:
    from collie_lab.optim.kernels import kernel_source

    for rule, rounding, operands, scalars in _kernels():
        compile(kernel_source(rule, rounding, operands, scalars), "kernel", "exec")


def test_an_unknown_function_is_refused() -> None:
    from collie_lab.optim.kernels import kernel_source

    class Cubic(AdaLomo):
        def update(self, weight: Any, gradient: Any, states: Any, scalars: Any) -> Any:
            return torch.erf(weight), {}

    with pytest.raises(TypeError, match=r"Cubic\.update uses .*erf"):
        kernel_source(Cubic(), "exact", (), ())


def _kernels() -> Iterator[tuple[Rule, str, tuple[tuple[str, str], ...], tuple[str, ...]]]:
    for rule, hyper in RULES.values():
        states = tuple((name, "full") for name in rule.init(torch.zeros(2)))
        operands, scalars = (FACTORS, ()) if isinstance(rule, AdaLomo) else (states, tuple(rule.scalars(hyper, 1)))
        for rounding in ROUNDINGS:
            yield rule, rounding, operands, scalars


# --- in a process of their own ------------------------------------------------------------------------


def interpret() -> None:
    from collie_lab.optim import kernels
    from collie_lab.optim.engine import Eager
    from collie_lab.optim.rounding import Weight
    from collie_lab.optim.rule import Gradient
    from collie_lab.testing.optimizers import KINDS, check_engine

    calls: list[int] = []
    build = kernels.build_kernel

    def counted(*names: Any) -> Any:
        calls.append(1)
        return build(*names)

    kernels.build_kernel = counted  # type: ignore[assignment]
    kinds = [kind for kind in KINDS if kind[0] != torch.float64]
    for name, (rule, hyper) in RULES.items():
        steps = 2 if name == "adan" else 1  # Adan's first step leaves out terms
        check_engine(rule, hyper, "triton", kinds, steps=steps, truncates=True)
    assert calls, "nothing reached the kernels"

    device = torch.device("cpu")
    triton, eager = kernels.Triton(device), Eager(device)
    source = torch.Generator().manual_seed(0)
    for m, n in ((1, 1), (1, 300), (33, 1), (16, 256), (17, 257), (50, 7)):
        for dtype, rounding in ((torch.float32, "exact"), (torch.bfloat16, "kahan"), (torch.bfloat16, "master"),
                                (torch.bfloat16, "stochastic")):
            tensor = torch.randn(m, n, generator=source).to(dtype)
            extra = {"kahan": 1e-3 * torch.randn(m, n, generator=source).bfloat16(),
                     "master": torch.randn(m, n, generator=source)}.get(rounding)
            weight = Weight(tensor, rounding, extra)
            raw = torch.randn(m, n, generator=source).to(dtype)
            for gradient in (Gradient(raw), Gradient(raw, torch.tensor(0.3)), Gradient(raw, None, 0.2),
                             Gradient(raw, torch.tensor(0.3), 0.2)):
                for one, other in zip(triton.moments(weight, gradient), eager.moments(weight, gradient), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
                row, column = torch.rand(m, generator=source), torch.rand(n, generator=source)
                torch.testing.assert_close(triton.energy(gradient, row, column, torch.float32),
                                           eager.energy(gradient, row, column, torch.float32), rtol=1e-5, atol=1e-6)


def compile_for_h200() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from collie_lab.optim import kernels

    def check(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
        signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature=signature,
                           constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()})
        assert ".target sm_90" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

    clipped = {"SCALED": True, "LIMITED": True}
    numbers = {"limit": "fp32", "noise": "i32", "n": "i32", "m": "i32", "width": "i32"}
    for rule, rounding, operands, scalars in _kernels():
        half = "*fp32" if rounding == "exact" else "*bf16"
        check(kernels.build_kernel(rule, rounding, operands, scalars),
              {**numbers, "w_ptr": half, "e_ptr": "*fp32" if rounding == "master" else half, "g_ptr": half,
               **{f"s_{name}": "fp32" for name in scalars}}, {**clipped, "BLOCK": kernels._BLOCK})
    blocks = {"ROWS": kernels._ROWS, "COLUMNS": kernels._COLUMNS}
    for rounding in ROUNDINGS:
        half = "*fp32" if rounding == "exact" else "*bf16"
        check(kernels._moments, {**numbers, "w_ptr": half, "g_ptr": half,
                                 "e_ptr": "*fp32" if rounding == "master" else half},
              {**clipped, **blocks, "KAHAN": rounding == "kahan", "MASTER": rounding == "master"})
    check(kernels._energy, {**numbers, "g_ptr": "*bf16"}, {**clipped, **blocks})
