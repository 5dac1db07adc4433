"""The CPU engine: every formula becomes a C++ loop, built in half a second, that moves every byte once.

The loops (`optim.loops`) are called through ctypes, once for all parameters of a step.
"""

from __future__ import annotations

import ctypes
import functools
import math
from array import array
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from collie_lab.compiler import build, find_compiler
from collie_lab.optim.engine import Eager, Engine, Formula
from collie_lab.optim.loops import Kind, Loops, write_factored, write_loop, write_sums
from collie_lab.optim.rounding import Weight, compute_dtype
from collie_lab.optim.rule import Gradient, Scalars, States, Update
from collie_lab.optim.trace import is_flat, operand_kind

__all__ = ["Native", "factored_scratch", "split_factored"]

#: The types that the loops know, and in which they compute; a look is quicker than asking torch for each tensor.
_COMPUTE = {dtype: compute_dtype(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}


class Native(Engine):
    """Loops for contiguous tensors on a CPU; what is not contiguous goes the eager way.

    Raises:
        OSError, SubprocessError: there is no C++ compiler, or it does not work.
    """

    def __init__(self, device: torch.device):
        self._eager = Eager(device)
        if find_compiler() is None:
            raise FileNotFoundError("there is no C++ compiler (g++ or clang++)")
        _sums(Kind("exact", torch.float32, torch.float32, clipped=False))  # a trial

    @override
    def elementwise(self, formula: Formula, weight: Weight, gradient: Gradient, operands: States,
                    scalars: Scalars) -> None:
        self._elementwise(formula, [(weight, gradient, operands)], scalars)

    @override
    def elementwise_all(self, formula: Formula, updates: Sequence[Update], scalars: Scalars) -> None:
        self._elementwise(formula, [update[:3] for update in updates], scalars)

    def _elementwise(self, formula: Formula, updates: list[tuple[Weight, Gradient, States]], scalars: Scalars) -> None:
        tables: dict[Any, _Table] = {}
        for weight, gradient, operands in updates:
            w = weight.tensor
            if not _suits(w, gradient.raw, operands):
                self._eager.elementwise(formula, weight, gradient, operands, scalars)
                continue
            kinds = tuple([(name, operand_kind(tensor, w)) for name, tensor in operands.items()])
            n = 1 if is_flat(kinds) else w.shape[-1]
            _table(tables, weight, gradient, kinds).add(weight, gradient, n, operands.values())
        for (*_, kinds), table in tables.items():
            table.run(_loop(formula, table.kind, kinds, tuple(scalars)), *scalars.values())

    @override
    def factored(self, matrix: Formula, vector: Formula, updates: Sequence[Update], scalars: Scalars
                 ) -> list[Update]:
        mine, left = split_factored(updates)
        tables: dict[Any, _Table] = {}
        for weight, gradient, states, _ in mine:
            is_matrix = weight.tensor.ndim == 2
            n = weight.tensor.shape[1] if is_matrix else 1
            _table(tables, weight, gradient, is_matrix).add(weight, gradient, n, states.values())
        scratch = factored_scratch(mine)
        for (*_, are_matrices), table in tables.items():
            functions, beta = _factored(matrix, vector, table.kind), scalars["beta"]
            table.run(functions.matrices if are_matrices else functions.vectors, beta, 1 - beta, scalars["lr"],
                      scalars["weight_decay"], scratch.data_ptr())
        return left

    @override
    def moments(self, weight: Weight, gradient: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        w, g, e = weight.tensor, gradient.raw, weight.extra
        if not _suits(w, g, {}):
            return self._eager.moments(weight, gradient)
        (m, n), threads = w.shape, torch.get_num_threads()
        row, columns = torch.empty(m, dtype=weight.dtype), torch.empty(threads, n, dtype=weight.dtype)
        square = _sums(_kind(weight, gradient)).moments(
            m, n, threads, w.data_ptr(), (w if e is None else e).data_ptr(), g.data_ptr(), *_clip(gradient),
            row.data_ptr(), columns.data_ptr())
        return row, columns[0], torch.tensor(square, dtype=weight.dtype)

    @override
    def energy(self, gradient: Gradient, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        g = gradient.raw
        if not _suits(row, g, {"column": column}):
            return self._eager.energy(gradient, row, column, dtype)
        kind = Kind("exact", dtype, g.dtype, _is_clipped(gradient))
        return torch.tensor(_sums(kind).energy(
            *g.shape, torch.get_num_threads(), g.data_ptr(), *_clip(gradient), row.data_ptr(), column.data_ptr()),
            dtype=dtype)


def split_factored(updates: Sequence[Update]) -> tuple[list[Update], list[Update]]:
    """The updates that `Native.factored` makes, of whole matrices and vectors, and those that it leaves."""
    sides: tuple[list[Update], list[Update]] = [], []
    for update in updates:
        weight, gradient, states, shards = update
        w = weight.tensor
        suits = not shards.dims and w.ndim <= 2 and w.numel() and _suits(w, gradient.raw, states)
        sides[0 if suits else 1].append(update)
    return sides


def factored_scratch(updates: Sequence[Update]) -> Tensor:
    """Memory for what AdaLomo's passes note of the largest matrix: of its rows, and for each thread of its columns."""
    threads, weights = torch.get_num_threads(), [update.weight for update in updates if update.weight.tensor.ndim == 2]
    sizes = [(weight.tensor.shape[0] + weight.tensor.shape[1] * threads) * weight.dtype.itemsize for weight in weights]
    return torch.empty(max(sizes, default=0), dtype=torch.uint8)


class _Table:
    """Tensors that share a call: of each its sizes, where its noise begins, and its addresses."""

    def __init__(self, weight: Weight, gradient: Gradient):
        self.kind, self._clip = _kind(weight, gradient), _clip(gradient)
        self._rows: list[int] = []
        self._count = 0

    def add(self, weight: Weight, gradient: Gradient, n: int, operands: Iterable[Tensor]) -> None:
        """One more, as a matrix with `n` columns."""
        w, e = weight.tensor, weight.extra
        address = w.data_ptr()
        self._rows += [w.numel() // max(1, n), n, weight.noise & 0xFFFFFFFF, address,
                       address if e is None else e.data_ptr(), gradient.raw.data_ptr(),
                       *[operand.data_ptr() for operand in operands]]
        self._count += 1

    def run(self, function: Any, *rest: float) -> None:
        """Call a function of `optim.loops` with the table, and what else it takes."""
        rows = array("q", self._rows)
        function(rows.buffer_info()[0], self._count, torch.get_num_threads(), *self._clip, *rest)


def _table(tables: dict[Any, _Table], weight: Weight, gradient: Gradient, what: Hashable) -> _Table:
    """The table of all that has the same types, clipping, and `what` else."""
    key = weight.rounding, weight.tensor.dtype, gradient.raw.dtype, id(gradient.scale), gradient.limit, what
    table = tables.get(key)
    if table is None:
        table = tables[key] = _Table(weight, gradient)
    return table


@functools.cache
def _loop(formula: Formula, kind: Kind, operands: tuple[tuple[str, str], ...], scalars: tuple[str, ...]) -> Any:
    run = _build(write_loop(formula, kind, operands, scalars)).run
    run.argtypes = [*_table_types(kind), *[kind.number for _ in scalars]]
    return run


@functools.cache
def _sums(kind: Kind) -> Any:
    functions = _build(write_sums(kind))
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, kind.number
    functions.moments.argtypes = [size, size, ctypes.c_int, pointer, pointer, pointer, number, number, pointer, pointer]
    functions.energy.argtypes = [size, size, ctypes.c_int, pointer, number, number, pointer, pointer]
    functions.moments.restype = functions.energy.restype = ctypes.c_double
    return functions


@functools.cache
def _factored(matrix: Formula, vector: Formula, kind: Kind) -> Any:
    functions = _build(write_factored(matrix, vector, kind))
    for function in (functions.matrices, functions.vectors):
        function.argtypes = [*_table_types(kind), *[kind.number] * 4, ctypes.c_void_p]
    return functions


def _table_types(kind: Kind) -> list[Any]:
    return [ctypes.c_void_p, ctypes.c_long, ctypes.c_int, kind.number, kind.number]


def _build(loops: Loops) -> Any:
    return build(loops.source, loops.flags)


def _kind(weight: Weight, gradient: Gradient) -> Kind:
    return Kind(weight.rounding, weight.tensor.dtype, gradient.raw.dtype, _is_clipped(gradient))


def _clip(gradient: Gradient) -> tuple[float, float]:
    """Scale and limit; what does nothing to a gradient where there is none."""
    scale = 1.0 if gradient.scale is None else float(gradient.scale)
    return scale, math.inf if gradient.limit is None else gradient.limit


def _is_clipped(gradient: Gradient) -> bool:
    return gradient.scale is not None or gradient.limit is not None


def _suits(weight: Tensor, gradient: Tensor, operands: States) -> bool:
    """Whether addresses mean what the loops take them for."""
    compute = _COMPUTE.get(weight.dtype)
    return (compute is not None and gradient.dtype in _COMPUTE and weight.is_cpu and weight.is_contiguous()
            and gradient.is_contiguous()
            and all(tensor.dtype == compute and tensor.is_contiguous() for tensor in operands.values()))
