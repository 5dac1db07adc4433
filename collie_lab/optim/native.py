"""The CPU engine: every formula becomes a C++ loop, built in half a second, that moves every byte once.

The loops (`optim.loops`) are called through ctypes, once for all parameters of a step.
"""

from __future__ import annotations

import ctypes
import functools
import math
from array import array
from collections.abc import Callable, Hashable, Iterable
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
from collie_lab.optim.updates import Updates

__all__ = ["Native", "factored_scratch", "split_factored"]

#: The types that the loops know, and in which they compute; a look is quicker than asking torch for each tensor.
_COMPUTE = {dtype: compute_dtype(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}


class Native(Engine):
    """Loops for contiguous tensors on a CPU; what is not contiguous goes the eager way.

    Raises:
        OSError, SubprocessError: there is no C++ compiler, or it does not work.
    """

    keeps = True

    def __init__(self, device: torch.device):
        self._eager = Eager(device)
        if find_compiler() is None:
            raise FileNotFoundError("there is no C++ compiler (g++ or clang++)")
        _sums(Kind("exact", torch.float32, torch.float32, clipped=False))  # a trial

    @override
    def elementwise(self, formula: Formula, weight: Weight, gradient: Gradient, operands: States,
                    scalars: Scalars) -> None:
        layout = _layout(weight, gradient, operands)
        if layout is None:
            self._eager.elementwise(formula, weight, gradient, operands, scalars)
            return
        kinds, n = layout
        table = _Table(_kind(weight, gradient), kinds)
        table.add(0, weight, gradient, operands, n)
        _run(formula, table, _clip(gradient.scale, gradient.limit), scalars)

    @override
    def elementwise_all(self, formula: Formula, updates: Updates, scalars: Scalars) -> None:
        tables, left = _tables(updates, formula, lambda update: _layout(*update[:3]))
        for place in left:
            self._eager.elementwise(formula, *updates[place][:3], scalars)
        clip = _clip(updates.scale, updates.limit)
        for table in tables:
            _run(formula, table, clip, scalars)

    @override
    def factored(self, matrix: Formula, vector: Formula, updates: Updates, scalars: Scalars) -> list[Update]:
        tables, left = _tables(updates, (matrix, vector), _factored_layout)
        clip = _clip(updates.scale, updates.limit)
        scratch = factored_scratch(updates.weights[place] for table in tables if table.layout for place in table.places)
        for table in tables:
            functions, beta = _factored(matrix, vector, table.kind), scalars["beta"]
            table.run(functions.matrices if table.layout else functions.vectors, clip, beta, 1 - beta, scalars["lr"],
                      scalars["weight_decay"], scratch.data_ptr())
        return [updates[place] for place in left]

    @override
    def moments(self, weight: Weight, gradient: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        w, g, e = weight.tensor, gradient.raw, weight.extra
        if not _suits(w, g, {}):
            return self._eager.moments(weight, gradient)
        (m, n), threads = w.shape, torch.get_num_threads()
        row, columns = torch.empty(m, dtype=weight.dtype), torch.empty(threads, n, dtype=weight.dtype)
        square = _sums(_kind(weight, gradient)).moments(
            m, n, threads, w.data_ptr(), (w if e is None else e).data_ptr(), g.data_ptr(),
            *_clip(gradient.scale, gradient.limit), row.data_ptr(), columns.data_ptr())
        return row, columns[0], torch.tensor(square, dtype=weight.dtype)

    @override
    def energy(self, gradient: Gradient, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        g = gradient.raw
        if not _suits(row, g, {"column": column}):
            return self._eager.energy(gradient, row, column, dtype)
        kind = Kind("exact", dtype, g.dtype, _is_clipped(gradient))
        return torch.tensor(_sums(kind).energy(
            *g.shape, torch.get_num_threads(), g.data_ptr(), *_clip(gradient.scale, gradient.limit), row.data_ptr(),
            column.data_ptr()), dtype=dtype)


def split_factored(updates: Iterable[Update]) -> tuple[list[Update], list[Update]]:
    """The updates that `Native.factored` makes, of whole matrices and vectors, and those that it leaves."""
    sides: tuple[list[Update], list[Update]] = [], []
    for update in updates:
        sides[0 if _is_whole(update) else 1].append(update)
    return sides


def factored_scratch(matrices: Iterable[Tensor]) -> Tensor:
    """Memory for what AdaLomo's passes note of the largest matrix: of its rows, and for each thread of its columns."""
    threads = torch.get_num_threads()
    sizes = [(each.shape[0] + each.shape[1] * threads) * compute_dtype(each.dtype).itemsize for each in matrices]
    return torch.empty(max(sizes, default=0), dtype=torch.uint8)


class _Table:
    """Tensors that share a call: of each its sizes, where its noise begins, and its addresses.

    Attributes:
        kind, layout: what they have in common: their types, and how operands lie beside weights.
        places: theirs among the updates.
    """

    def __init__(self, kind: Kind, layout: Any):
        self.kind, self.layout = kind, layout
        self.places: list[int] = []
        self._rows = array("q")

    def add(self, place: int, weight: Weight, gradient: Gradient, operands: States, n: int) -> None:
        """One more, at that place of its updates, as a matrix with `n` columns."""
        w, e = weight.tensor, weight.extra
        address = w.data_ptr()
        self.places.append(place)
        self._rows.extend([w.numel() // max(1, n), n, weight.noise & 0xFFFFFFFF, address,
                           address if e is None else e.data_ptr(), gradient.raw.data_ptr(),
                           *[operand.data_ptr() for operand in operands.values()]])

    def renew(self, updates: Updates) -> None:
        """Take what is another in each step: noise and gradients."""
        width = len(self._rows) // len(self.places)
        self._rows[2::width] = array("q", [updates.noise[place] & 0xFFFFFFFF for place in self.places])
        self._rows[5::width] = array("q", [updates.gradients[place].data_ptr() for place in self.places])

    def run(self, function: Any, clip: tuple[float, float], *rest: float) -> None:
        """Call a function of `optim.loops` with the table, and what else it takes."""
        function(self._rows.buffer_info()[0], len(self.places), torch.get_num_threads(), *clip, *rest)


def _tables(updates: Updates, key: Hashable, layout: Callable[[Update], tuple[Hashable, int] | None]
            ) -> tuple[list[_Table], list[int]]:
    """The tables of updates, and the places of those that go another way; kept for the next step.

    Args:
        key: what the tables are for.
        layout: of an update, how its operands lie, and how many columns it has; None: it goes another way.
    """
    key = key, updates.scale is not None  # which the kind of a table says too
    if key in updates.kept:
        tables, left = updates.kept[key]
        for table in tables:
            table.renew(updates)
        return tables, left
    made: dict[Any, _Table] = {}
    left = []
    for place, update in enumerate(updates):
        if (found := layout(update)) is None:
            left.append(place)
            continue
        what, n = found
        kind = _kind(update.weight, update.gradient)
        made.setdefault((kind, what), _Table(kind, what)).add(place, *update[:3], n)
    tables = list(made.values())
    updates.kept[key] = tables, left
    return tables, left


def _run(formula: Formula, table: _Table, clip: tuple[float, float], scalars: Scalars) -> None:
    table.run(_loop(formula, table.kind, table.layout, tuple(scalars)), clip, *scalars.values())


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


def _clip(scale: Tensor | None, limit: float | None) -> tuple[float, float]:
    """Scale and limit; what does nothing to a gradient where there is none."""
    return 1.0 if scale is None else float(scale), math.inf if limit is None else limit


def _is_clipped(gradient: Gradient) -> bool:
    return gradient.scale is not None or gradient.limit is not None


def _layout(weight: Weight, gradient: Gradient, operands: States) -> tuple[tuple[tuple[str, str], ...], int] | None:
    """How operands lie beside a weight, and its columns; None: no loop takes them."""
    w = weight.tensor
    if not _suits(w, gradient.raw, operands):
        return None
    kinds = tuple([(name, operand_kind(tensor, w)) for name, tensor in operands.items()])
    return kinds, 1 if is_flat(kinds) else w.shape[-1]


def _is_whole(update: Update) -> bool:
    """Whether AdaLomo's own loops take a parameter: a whole matrix, vector or number."""
    weight, gradient, states, shards = update
    w = weight.tensor
    return bool(not shards.dims and w.ndim <= 2 and w.numel() and _suits(w, gradient.raw, states))


def _factored_layout(update: Update) -> tuple[bool, int] | None:
    """Whether it is a matrix, and its columns; None: AdaLomo's own loops do not take it."""
    if not _is_whole(update):
        return None
    w = update.weight.tensor
    return (True, w.shape[1]) if w.ndim == 2 else (False, 1)


def _suits(weight: Tensor, gradient: Tensor, operands: States) -> bool:
    """Whether addresses mean what the loops take them for."""
    compute = _COMPUTE.get(weight.dtype)
    return (compute is not None and gradient.dtype in _COMPUTE and weight.is_cpu and weight.is_contiguous()
            and gradient.is_contiguous()
            and all(tensor.dtype == compute and tensor.is_contiguous() for tensor in operands.values()))
