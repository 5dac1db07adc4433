"""The CUDA engine: one Triton kernel template for all element-wise formulas, and AdaLomo's reductions.

A rule's formula is written once, in torch. Here it is traced, and the trace becomes the middle of a kernel that
loads a block of weights, gradients and operands, updates it, rounds and stores: every byte moves once. The
source of a kernel can be read: `kernel_source(rule, ...)`.
"""

from __future__ import annotations

import functools
import linecache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from typing_extensions import override

from collie_lab.optim.engine import Eager, Engine, Formula
from collie_lab.optim.rounding import MULTIPLIER_1, MULTIPLIER_2, Weight, wrap32
from collie_lab.optim.rule import Gradient, Scalars, States
from collie_lab.optim.trace import TRITON, operand_kind, trace

__all__ = ["Triton", "build_kernel", "kernel_source"]

_BLOCK = 1024
_ROWS, _COLUMNS = 16, 256

# What `Weight.read` and `Weight.write` do, in a kernel; E stands for the extra tensor.
_READ = {
    "exact": "weight = tl.load(w_ptr + i, mask=mask).to(tl.float32)",
    "stochastic": "weight = tl.load(w_ptr + i, mask=mask).to(tl.float32)",
    "kahan": "weight = tl.load(w_ptr + i, mask=mask).to(tl.float32) + tl.load(e_ptr + i, mask=mask).to(tl.float32)",
    "master": "weight = tl.load(e_ptr + i, mask=mask)",
}
_WRITE = {
    "exact": "tl.store(w_ptr + i, {new}, mask=mask)",
    "stochastic": f"""x = (i + noise).to(tl.int32)
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * {MULTIPLIER_1}
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * ({MULTIPLIER_2})
    x = x ^ ((x >> 16) & 0xFFFF)
    new = {{new}}
    bits = (new.to(tl.int32, bitcast=True) + (x & 0xFFFF)) & -0x10000
    new = tl.where(new == new, bits.to(tl.float32, bitcast=True), new)
    tl.store(w_ptr + i, new.to(tl.bfloat16), mask=mask)""",
    "kahan": """rounded = ({new}).to(tl.bfloat16)
    tl.store(e_ptr + i, ({new} - rounded.to(tl.float32)).to(tl.bfloat16), mask=mask)
    tl.store(w_ptr + i, rounded, mask=mask)""",
    "master": """tl.store(e_ptr + i, {new}, mask=mask)
    tl.store(w_ptr + i, ({new}).to(tl.bfloat16), mask=mask)""",
}
_LOAD = {
    "full": "{0} = tl.load({0}_ptr + i, mask=mask)",
    "column": "{0} = tl.load({0}_ptr + i // width, mask=mask)",
    "row": "{0} = tl.load({0}_ptr + i % width, mask=mask)",
    "number": "{0} = tl.load({0}_ptr)",
}
_TEMPLATE = """
@triton.jit
def kernel(w_ptr, e_ptr, g_ptr, scale_ptr, limit, noise, n, width{pointers}{numbers},
           SCALED: tl.constexpr, LIMITED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    {read}
    gradient = tl.load(g_ptr + i, mask=mask).to(tl.float32)
    if SCALED:
        gradient = gradient * tl.load(scale_ptr)
    if LIMITED:
        gradient = tl.where(gradient > limit, limit, tl.where(gradient < -limit, -limit, gradient))
    {body}
    {write}
"""


class Triton(Engine):
    """Kernels for contiguous fp32 and bf16 weights; float64, which no one trains in, is left to torch."""

    def __init__(self, device: torch.device):
        self._eager = Eager(device)
        tiny = torch.ones(1, 1, device=device)
        self.energy(Gradient(tiny), tiny[0], tiny[0], tiny.dtype)  # a trial

    @override
    def elementwise(self, formula: Formula, weight: Weight, gradient: Gradient, operands: States,
                    scalars: Scalars) -> None:
        raw, w = gradient.raw, weight.tensor
        if not _suits(w, raw, *operands.values()):
            self._eager.elementwise(formula, weight, gradient, operands, scalars)
            return
        kinds = tuple((name, operand_kind(tensor, w)) for name, tensor in operands.items())
        kernel = build_kernel(formula, weight.rounding, kinds, tuple(scalars))
        count, width = w.numel(), w.shape[-1] if w.ndim else 1
        if count == 0:
            return
        extra = w if weight.extra is None else weight.extra
        scale = w if gradient.scale is None else gradient.scale
        with torch.cuda.device_of(w):  # Triton launches on the current device
            kernel[(triton.cdiv(count, _BLOCK),)](
                w, extra, raw, scale, float(gradient.limit or 0), wrap32(weight.noise), count, width,
                *operands.values(), *[float(value) for value in scalars.values()], SCALED=gradient.scale is not None,
                LIMITED=gradient.limit is not None, BLOCK=_BLOCK)

    @override
    def moments(self, weight: Weight, gradient: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        w, raw = weight.tensor, gradient.raw
        if not _suits(w, raw) or w.numel() == 0:
            return self._eager.moments(weight, gradient)
        m, n = w.shape
        blocks = triton.cdiv(m, _ROWS)
        row = torch.empty(m, device=w.device)
        # Sums over blocks by torch: atomic additions would come in another order each time.
        columns, squares = torch.empty(blocks, n, device=w.device), torch.empty(blocks, device=w.device)
        extra = w if weight.extra is None else weight.extra
        with torch.cuda.device_of(w):
            _moments[(blocks,)](
                w, extra, raw, raw if gradient.scale is None else gradient.scale, float(gradient.limit or 0), row,
                columns, squares, m, n, KAHAN=weight.rounding == "kahan", MASTER=weight.rounding == "master",
                SCALED=gradient.scale is not None, LIMITED=gradient.limit is not None, ROWS=_ROWS, COLUMNS=_COLUMNS)
        return row, columns.sum(0), squares.sum()

    @override
    def energy(self, gradient: Gradient, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        raw = gradient.raw
        if not _suits(raw, row, column) or raw.numel() == 0:
            return self._eager.energy(gradient, row, column, dtype)
        m, n = raw.shape
        sums = torch.empty(triton.cdiv(m, _ROWS), device=raw.device)
        with torch.cuda.device_of(raw):
            _energy[(len(sums),)](
                raw, raw if gradient.scale is None else gradient.scale, float(gradient.limit or 0), row, column, sums,
                m, n, SCALED=gradient.scale is not None, LIMITED=gradient.limit is not None, ROWS=_ROWS,
                COLUMNS=_COLUMNS)
        return sums.sum()


def kernel_source(formula: Formula, rounding: str, operands: tuple[tuple[str, str], ...],
                  scalars: tuple[str, ...]) -> str:
    """The source of the kernel of a formula; `operands` are (name, full | row | column | number)."""
    statements, value, new = trace(formula, tuple(name for name, _ in operands), scalars, TRITON)
    lines = [_LOAD[kind].format(f"o_{name}") for name, kind in operands]
    lines += [f"{name} = {expression}" for name, expression in statements]
    # All is read before anything is stored.
    lines += [f"tl.store(o_{name}_ptr + i, {state}, mask=mask)" for name, state in new.items()]
    return _TEMPLATE.format(
        pointers="".join(f", o_{name}_ptr" for name, _ in operands), numbers="".join(f", s_{name}" for name in scalars),
        read=_READ[rounding], body="\n    ".join(lines), write=_WRITE[rounding].format(new=value))


@functools.cache
def build_kernel(formula: Formula, rounding: str, operands: tuple[tuple[str, str], ...],
                 scalars: tuple[str, ...]) -> Any:
    """The kernel of a formula, ready to launch."""
    source = kernel_source(formula, rounding, operands, scalars)
    # Triton reads a function's source from its file: linecache lends it one.
    file = f"<collie_lab kernel {formula} {rounding} {operands}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    return namespace["kernel"]


def _suits(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() and tensor.dtype != torch.float64 for tensor in tensors)


@triton.jit
def _read_gradient(g_ptr, at, mask, scale_ptr, limit, SCALED: tl.constexpr, LIMITED: tl.constexpr):  # type: ignore
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
    if SCALED:
        g = g * tl.load(scale_ptr)
    if LIMITED:
        g = tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))
    return g


@triton.jit
def _moments(w_ptr, e_ptr, g_ptr, scale_ptr, limit, row_ptr, columns_ptr, squares_ptr, m, n,  # type: ignore
             KAHAN: tl.constexpr, MASTER: tl.constexpr, SCALED: tl.constexpr, LIMITED: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    row_sum = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, n, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        at = rows[:, None].to(tl.int64) * n + columns[None, :]
        mask = (rows[:, None] < m) & (columns[None, :] < n)
        g = _read_gradient(g_ptr, at, mask, scale_ptr, limit, SCALED, LIMITED)
        row_sum += tl.sum(g * g, 1)
        tl.store(columns_ptr + block.to(tl.int64) * n + columns, tl.sum(g * g, 0), mask=columns < n)
        if MASTER:
            w = tl.load(e_ptr + at, mask=mask, other=0)
        else:
            w = tl.load(w_ptr + at, mask=mask, other=0).to(tl.float32)
        if KAHAN:
            w += tl.load(e_ptr + at, mask=mask, other=0).to(tl.float32)
        square += tl.sum(w * w, 1)
    tl.store(row_ptr + rows, row_sum, mask=rows < m)
    tl.store(squares_ptr + block, tl.sum(square, 0))


@triton.jit
def _energy(g_ptr, scale_ptr, limit, row_ptr, column_ptr, sums_ptr, m, n, SCALED: tl.constexpr,  # type: ignore
            LIMITED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.program_id(0)
    rows = block * ROWS + tl.arange(0, ROWS)
    row = tl.load(row_ptr + rows, mask=rows < m, other=0)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, n, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        at = rows[:, None].to(tl.int64) * n + columns[None, :]
        mask = (rows[:, None] < m) & (columns[None, :] < n)
        g = _read_gradient(g_ptr, at, mask, scale_ptr, limit, SCALED, LIMITED)
        column = tl.load(column_ptr + columns, mask=columns < n, other=0)
        u = g * row[:, None] * column[None, :]
        total += tl.sum(u * u, 1)
    tl.store(sums_ptr + block, tl.sum(total, 0))
