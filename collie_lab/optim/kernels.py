"""The CUDA engine: one Triton kernel template for all element-wise formulas.

A rule's formula is written once, in torch. Here it is traced, and the trace becomes the middle of a kernel that
loads a block of weights, gradients and operands, updates it, rounds and stores: every byte moves once. The
source of a kernel can be read: `kernel_source(rule, ...)`.

A launch costs the host tens of microseconds, in which the GPU moves 100 MB. So all tensors of a step share one
(`optim.table`); a single tensor, as it comes in backward, is given by arguments.
"""

from __future__ import annotations

import functools
import linecache
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from collie_lab.optim.engine import Eager, Engine, Formula
from collie_lab.optim.factored import Factored
from collie_lab.optim.rounding import MULTIPLIER_1, MULTIPLIER_2, Weight, wrap32
from collie_lab.optim.rule import Gradient, Scalars, States, Update
from collie_lab.optim.table import TYPES, Launches, Owners, Table, aligned, blocks, clipping, extra_type, on, upload
from collie_lab.optim.trace import FACTORS, TRITON, VECTOR, operand_kind, trace
from collie_lab.optim.updates import Updates

__all__ = ["Triton", "build_kernel", "kernel_source"]

_BLOCK = 2048
#: Columns of a tile of a matrix, where rows and columns have numbers of their own.
_COLUMNS = 512

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
    "full": "{0} = tl.load({0}_ptr + i, mask=mask).to(tl.float32)",
    "column": "{0} = tl.load({0}_ptr + r, mask=r < n // width)",
    "row": "{0} = tl.load({0}_ptr + c, mask=c < width)",
    "number": "{0} = tl.load({0}_ptr)",
}
_ONE = """
@triton.jit
def kernel(w_ptr, e_ptr, g_ptr, noise, n, width{pointers}{numbers}, scale_ptr, limit,
           SCALED: tl.constexpr, LIMITED: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
"""
_MANY = """
@triton.jit
def kernel(table_ptr, owner_ptr{numbers}, scale_ptr, limit, W: tl.constexpr, E: tl.constexpr, G: tl.constexpr,
           FIELDS: tl.constexpr, ALIGNED: tl.constexpr, SCALED: tl.constexpr, LIMITED: tl.constexpr,
           BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    row_ptr = table_ptr + tl.load(owner_ptr + tl.program_id(0)).to(tl.int64) * FIELDS
    block = tl.program_id(0) - tl.load(row_ptr)
    n, width, noise = tl.load(row_ptr + 1), tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    w_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(W))
    e_ptr = tl.load(row_ptr + 5).to(tl.pointer_type(E))
    g_ptr = tl.load(row_ptr + 6).to(tl.pointer_type(G))
    {fields}
    if ALIGNED:
        n, width = tl.multiple_of(n, 16), tl.multiple_of(width, 16)
        w_ptr, e_ptr, g_ptr = tl.multiple_of(w_ptr, 16), tl.multiple_of(e_ptr, 16), tl.multiple_of(g_ptr, 16)
        {hints}
"""
_FLAT = """
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
"""
_TILES = """
    tiles = tl.cdiv(width, COLUMNS)
    r = (block // tiles) * (BLOCK // COLUMNS) + tl.arange(0, BLOCK // COLUMNS)[:, None]
    c = (block % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    i = r * width + c
    mask = (r < n // width) & (c < width)
"""
_BODY = """
    {read}
    gradient = tl.load(g_ptr + i, mask=mask).to(tl.float32)
    if SCALED:
        gradient = gradient * tl.load(scale_ptr)
    if LIMITED:
        gradient = tl.where(gradient > limit, limit, tl.where(gradient < -limit, -limit, gradient))
    {body}
    {write}
"""
_Kinds = tuple[tuple[str, str], ...]


class _Launch(NamedTuple):
    """What the tensors of a launch have in common; its kernel is compiled for it."""

    rounding: str
    kinds: _Kinds
    weight: torch.dtype
    gradient: torch.dtype
    columns: int
    scale: Tensor | None
    limit: float | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for those that share a launch."""
        return (*self[:5], id(self.scale), self.limit)

    def programs(self, size: Any, width: Any) -> Any:
        """How many programs a tensor of that size and width (or many) takes."""
        if not self.columns:
            return -(-size // _BLOCK)
        return -(-(size // width) // (_BLOCK // self.columns)) * -(-width // self.columns)


class Triton(Engine):
    """Kernels for contiguous fp32 and bf16 weights; float64, which no one trains in, is left to torch."""

    together = True

    def __init__(self, device: torch.device):
        self._device, self._eager, self._owners = device, Eager(device), Owners(device)
        self._launches = Launches()
        self._factored = Factored(device, self._owners, self._launches)
        tiny = torch.ones(1, 1, device=device)
        self.energy(Gradient(tiny), tiny[0], tiny[0], tiny.dtype)  # a trial

    @override
    def elementwise(self, formula: Formula, weight: Weight, gradient: Gradient, operands: States,
                    scalars: Scalars) -> None:
        w, raw = weight.tensor, gradient.raw
        if not _suits(w, raw, *operands.values()):
            self._eager.elementwise(formula, weight, gradient, operands, scalars)
            return
        if w.numel() == 0:
            return
        launch, width = _launch(weight, gradient, _kinds(operands, w)), _width(w)
        kernel = build_kernel(formula, weight.rounding, launch.kinds, tuple(scalars), many=False)
        scale, limit, clipped = clipping(gradient.scale, gradient.limit, w)
        with on(self._device):
            kernel[(launch.programs(w.numel(), width),)](
                w, w if weight.extra is None else weight.extra, raw, wrap32(weight.noise), w.numel(), width,
                *operands.values(), *map(float, scalars.values()), scale, limit, **clipped, BLOCK=_BLOCK,
                COLUMNS=launch.columns)

    @override
    def elementwise_all(self, formula: Formula, updates: Updates, scalars: Scalars) -> None:
        if len(updates) == 1:
            super().elementwise_all(formula, updates, scalars)
            return
        launches: dict[Any, tuple[_Launch, list[list[int]]]] = {}
        for weight, gradient, operands, _ in updates:
            w, extra = weight.tensor, weight.extra
            if not _suits_table(w, gradient.raw, operands):
                self.elementwise(formula, weight, gradient, operands, scalars)
            elif size := w.numel():
                launch, address = _launch(weight, gradient, _kinds(operands, w)), w.data_ptr()
                launches.setdefault(launch.key, (launch, []))[1].append([
                    size, _width(w), wrap32(weight.noise), address, address if extra is None else extra.data_ptr(),
                    gradient.raw.data_ptr(), *[operand.data_ptr() for operand in operands.values()]])
        with on(self._device):
            for launch, rows in launches.values():
                self._update(formula, launch, *self._table(launch, np.array(rows, dtype=np.int64)), scalars)

    def _table(self, launch: _Launch, rows: NDArray[np.int64]) -> tuple[Table, NDArray[np.int64]]:
        """From sizes, widths, noise and addresses (weight, extra, gradient, operands); and the programs of each."""
        counts = launch.programs(rows[:, 0], rows[:, 1])
        wide = [place for place, (_, kind) in enumerate(launch.kinds, 6) if kind in ("full", "row")]
        table = upload(np.column_stack([blocks(counts), rows]), self._device)
        return Table(table, aligned(rows[:, [0, 1, 3, 4, 5, *wide]])), counts

    def _update(self, formula: Formula, launch: _Launch, table: Table, counts: NDArray[np.int64], scalars: Scalars
                ) -> None:
        """Update many."""
        kernel = build_kernel(formula, launch.rounding, launch.kinds, tuple(scalars), many=True)
        scale, limit, clipped = clipping(launch.scale, launch.limit, table.rows)
        owners, numbers = self._owners(counts.tolist()), map(float, scalars.values())
        self._launches(
            kernel, int(counts.sum()), (table.rows, owners, *numbers, scale, limit), W=TYPES[launch.weight],
            E=TYPES[extra_type(launch.rounding, launch.weight)], G=TYPES[launch.gradient], FIELDS=table.rows.shape[1],
            ALIGNED=table.aligned, **clipped, BLOCK=_BLOCK, COLUMNS=launch.columns)

    @override
    def factored(self, matrix: Formula, vector: Formula, updates: Updates, scalars: Scalars) -> list[Update]:
        left: list[Update] = []
        launches: dict[Any, tuple[_Launch, bool, list[Update]]] = {}
        for update in updates:
            weight, gradient, states, shards = update
            w = weight.tensor
            if shards.dims or w.ndim > 2 or not w.numel() or not _suits_table(w, gradient.raw, states):
                left.append(update)
                continue
            flat = w.ndim < 2
            launch = _launch(weight, gradient, VECTOR if flat else FACTORS)
            launches.setdefault(launch.key, (launch, flat, []))[2].append(update)
        with on(self._device):
            for launch, flat, some in launches.values():
                run = self._factored.vectors if flat else self._factored.matrices
                run(some, scalars, launch.programs,
                    functools.partial(self._update, vector if flat else matrix, launch, scalars={}))
        return left

    @override
    def moments(self, weight: Weight, gradient: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        if not _suits_table(weight.tensor, gradient.raw, {}) or weight.tensor.numel() == 0:
            return self._eager.moments(weight, gradient)
        return self._factored.moments(weight, gradient)

    @override
    def energy(self, gradient: Gradient, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        if not _suits_table(gradient.raw, gradient.raw, {"row": row, "column": column}) or gradient.raw.numel() == 0:
            return self._eager.energy(gradient, row, column, dtype)
        return self._factored.energy(gradient, row, column)


def kernel_source(formula: Formula, rounding: str, operands: _Kinds, scalars: tuple[str, ...], *, many: bool) -> str:
    """The source of the kernel of a formula; `operands` are (name, full | row | column | number).

    `many` tensors are found in a table, one is given by arguments.
    """
    statements, value, new = trace(formula, tuple(name for name, _ in operands), scalars, TRITON)
    lines = [_LOAD[kind].format(f"o_{name}") for name, kind in operands]
    lines += [f"{name} = {expression}" for name, expression in statements]
    # All is read before anything is stored.
    lines += [f"tl.store(o_{name}_ptr + i, {state}, mask=mask)" for name, state in new.items()]
    pointers = [f"o_{name}_ptr" for name, _ in operands]
    head = (_MANY if many else _ONE).format(
        pointers="".join(f", {pointer}" for pointer in pointers), numbers="".join(f", s_{name}" for name in scalars),
        fields=_lines(f"{pointer} = tl.load(row_ptr + {place}).to(tl.pointer_type(tl.float32))"
                      for place, pointer in enumerate(pointers, 7)),
        hints=_lines((f"o_{name}_ptr = tl.multiple_of(o_{name}_ptr, 16)" for name, kind in operands
                      if kind in ("full", "row")), indent=8))
    place = _TILES if any(kind in ("row", "column") for _, kind in operands) else _FLAT
    return head + place + _BODY.format(read=_READ[rounding], body=_lines(lines),
                                       write=_WRITE[rounding].format(new=value))


@functools.cache
def build_kernel(formula: Formula, rounding: str, operands: _Kinds, scalars: tuple[str, ...], *, many: bool) -> Any:
    """The kernel of a formula, ready to launch."""
    source = kernel_source(formula, rounding, operands, scalars, many=many)
    # Triton reads a function's source from its file: linecache lends it one.
    file = f"<collie_lab kernel {formula} {rounding} {operands} {many}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(source, file, "exec"), namespace)
    return namespace["kernel"]


def _lines(lines: Iterable[str], indent: int = 4) -> str:
    return ("\n" + " " * indent).join(lines)


def _launch(weight: Weight, gradient: Gradient, kinds: _Kinds) -> _Launch:
    tiled = any(kind in ("row", "column") for _, kind in kinds)
    columns = min(_COLUMNS, 1 << (_width(weight.tensor) - 1).bit_length()) if tiled else 0
    return _Launch(weight.rounding, kinds, weight.tensor.dtype, gradient.raw.dtype, columns, gradient.scale,
                   gradient.limit)


def _kinds(operands: States, weight: Tensor) -> _Kinds:
    return tuple([(name, operand_kind(tensor, weight)) for name, tensor in operands.items()])


def _width(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.ndim else 1


def _suits(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() and tensor.dtype != torch.float64 for tensor in tensors)


def _suits_table(weight: Tensor, gradient: Tensor, operands: States) -> bool:
    """Whether a table's addresses mean what its kernel takes them for."""
    if weight.dtype not in TYPES or gradient.dtype not in TYPES:
        return False
    # A loop: it runs for every parameter of every step.
    for operand in operands.values():
        if operand.dtype != torch.float32 or not operand.is_contiguous():
            return False
    return weight.is_contiguous() and gradient.is_contiguous()
