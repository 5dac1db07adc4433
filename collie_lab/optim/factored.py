"""AdaLomo's kernels: two passes over a gradient before its update, for all matrices of a step at once.

1. `_moments`, a block: sums of g² along its rows and its columns, sum of θ².
2. `_means`, some rows or some columns: the sums of all blocks together; the new mean squares r and c; 1/√r and 1/√c.
3. `_energy`, some rows: the sum of u².
4. `_sizes`, a tensor: 1 − αλ, and α √(mean c) / max(1, RMS u) into the row factors.

The update itself is an element-wise formula (`optim.kernels`), which reads the first fields of the same table. Sums
over blocks are taken in order: atomic additions would come in another order each time. Of a vector, one program does
all that, `_vectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from collie_lab.optim.rounding import Weight, wrap32
from collie_lab.optim.rule import Gradient, Scalars, Update
from collie_lab.optim.table import (
    TYPES,
    Launches,
    Owners,
    Table,
    aligned,
    blocks,
    clipping,
    extra_type,
    on,
    pointers,
    upload,
)
from collie_lab.optim.tiles import ACROSS, COLUMNS, DEEP, DOWN, LONG, ROWS, STEP, WIDE, Counts, scratch_sizes

__all__ = ["Factored"]

_Rows = NDArray[np.int64]

# The fields of a tensor's row in the table. First those that its update reads: the first of its programs, sizes, noise,
# addresses, and the operands of the formula (a vector's are v, 1 − αλ and α / max(1, RMS u)). Then those of the passes
# before: the first of their programs, and addresses.
_NAMES = ("first_update", "size", "n", "noise", "w", "e", "g", "row", "column", "numbers", "m", "first_block",
          "first_chunk", "first_tile", "row_sums", "column_sums", "squares", "means", "energies", "row_state",
          "column_state")
(_, _, _N, _, _W, _E, _G, _ROW, _COLUMN, _NUMBERS, _M, _FIRST_BLOCK, _FIRST_CHUNK, _FIRST_TILE, _ROW_SUMS, _COLUMN_SUMS,
 _SQUARES, _MEANS, _ENERGIES, _ROW_STATE, _COLUMN_STATE) = [tl.constexpr(at) for at in range(len(_NAMES))]
_FIELDS = tl.constexpr(len(_NAMES))
_TINY = tl.constexpr(1e-30)

Programs = Callable[[_Rows, _Rows], _Rows]
"""How many programs the updates of tensors take, from their sizes and widths."""


class Factored:
    """Launches the kernels on one device."""

    def __init__(self, device: torch.device, owners: Owners, launches: Launches):
        self._device, self._owners, self._launches = device, owners, launches

    def moments(self, weight: Weight, gradient: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        """See `Engine.moments`."""
        m, n = weight.tensor.shape
        down, across = triton.cdiv(m, DOWN), triton.cdiv(n, ACROSS)
        rows, columns, squares = (torch.empty(shape, device=self._device)
                                  for shape in ((across, m), (down, n), (down * across,)))
        fields = {"m": m, "n": n, "row_sums": rows.data_ptr(), "column_sums": columns.data_ptr(),
                  "squares": squares.data_ptr(), **_addresses([weight], [gradient])}
        with on(self._device):
            self._moments(self._table(fields), [down * across], weight, gradient)
        return rows.sum(0), columns.sum(0), squares.sum()

    def energy(self, gradient: Gradient, row: Tensor, column: Tensor) -> Tensor:
        """See `Engine.energy`."""
        m, n = gradient.raw.shape
        count = triton.cdiv(m, ROWS)
        energies = torch.empty(count, device=self._device)
        fields = {"m": m, "n": n, "g": gradient.raw.data_ptr(), "row": row.data_ptr(), "column": column.data_ptr(),
                  "energies": energies.data_ptr()}
        with on(self._device):
            self._energy(self._table(fields), [count], gradient, whole=True)
        return energies.sum()

    def matrices(self, updates: Sequence[Update], scalars: Scalars, programs: Programs,
                 update: Callable[[Table, _Rows], None]) -> None:
        """All passes; the last one is `update`, called with the table and what `programs` says. Updates that share a
        launch.
        """
        weight, gradient = updates[0].weight, updates[0].gradient
        shapes = np.array([each.weight.tensor.shape for each in updates], dtype=np.int64)
        m, n = shapes[:, 0], shapes[:, 1]
        count, last = Counts.of(m, n), programs(m * n, n)
        blocks_, chunks = count.down * count.across, count.row_chunks + count.column_chunks
        scratch, places = self._scratch(scratch_sizes(m, n))
        table = self._table({
            "first_update": blocks(last), "size": m * n, "n": n, "noise": _noise(updates), "m": m, **places,
            "first_block": blocks(blocks_), "first_chunk": blocks(chunks), "first_tile": blocks(count.tiles),
            **_addresses([each.weight for each in updates], [each.gradient for each in updates]),
            "row_state": pointers(each.states["row"] for each in updates),
            "column_state": pointers(each.states["column"] for each in updates)})
        beta, lr, weight_decay = (float(scalars[name]) for name in ("beta", "lr", "weight_decay"))
        self._moments(table, blocks_.tolist(), weight, gradient)
        self._launches(_means, int(chunks.sum()), (table.rows, self._owners(chunks.tolist()), beta, 1 - beta))
        self._energy(table, count.tiles.tolist(), gradient, whole=False)
        self._launches(_sizes, len(updates), (table.rows, lr, weight_decay))
        update(table, last)
        del scratch  # kept until here: the table knows it by its address

    def vectors(self, updates: Sequence[Update], scalars: Scalars, programs: Programs,
                update: Callable[[Table, _Rows], None]) -> None:
        """The same for vectors and numbers."""
        weight, gradient = updates[0].weight, updates[0].gradient
        n = np.array([each.weight.tensor.numel() for each in updates], dtype=np.int64)
        numbers, last = torch.empty(len(updates), 2, device=self._device), programs(n, n)
        places = numbers.data_ptr() + 8 * np.arange(len(updates))
        table = self._table({
            "first_update": blocks(last), "size": n, "n": n, "noise": _noise(updates),
            **_addresses([each.weight for each in updates], [each.gradient for each in updates]),
            "row": pointers(each.states["v"] for each in updates), "column": places, "numbers": places + 4})
        beta, lr, weight_decay = (float(scalars[name]) for name in ("beta", "lr", "weight_decay"))
        scale, limit, clipped = clipping(gradient.scale, gradient.limit, table.rows)
        self._launches(_vectors, len(updates), (table.rows, beta, 1 - beta, lr, weight_decay, scale, limit),
                       **_weight(weight), G=TYPES[gradient.raw.dtype], **clipped)
        update(table, last)

    def _moments(self, table: Table, counts: list[int], weight: Weight, gradient: Gradient) -> None:
        scale, limit, clipped = clipping(gradient.scale, gradient.limit, table.rows)
        self._launches(_moments, sum(counts), (table.rows, self._owners(counts), scale, limit), warps=1,
                       **_weight(weight), G=TYPES[gradient.raw.dtype], **clipped, ALIGNED=table.aligned)

    def _energy(self, table: Table, counts: list[int], gradient: Gradient, *, whole: bool) -> None:
        scale, limit, clipped = clipping(gradient.scale, gradient.limit, table.rows)
        self._launches(_energy, sum(counts), (table.rows, self._owners(counts), scale, limit),
                       G=TYPES[gradient.raw.dtype], **clipped, ALIGNED=table.aligned, WHOLE=whole)

    def _scratch(self, sizes: dict[str, _Rows]) -> tuple[Tensor, dict[str, _Rows]]:
        """One fp32 tensor for arrays of so many numbers, and their addresses."""
        whole = np.concatenate(list(sizes.values()))
        scratch = torch.empty(int(whole.sum()), device=self._device)
        addresses = scratch.data_ptr() + 4 * blocks(whole)
        return scratch, dict(zip(sizes, np.split(addresses, len(sizes)), strict=True))

    def _table(self, fields: dict[str, Any]) -> Table:
        rows = np.zeros((np.size(fields["n"]), len(_NAMES)), dtype=np.int64)
        for name, values in fields.items():
            rows[:, _NAMES.index(name)] = values
        # What is read 16 bytes at a time: the row factors are not, but they lie in scratch, and a vector's v is.
        wide = rows[:, [_N.value, _W.value, _E.value, _G.value, _ROW.value]]
        return Table(upload(rows, self._device), aligned(wide))


def _addresses(weights: Sequence[Weight], gradients: Sequence[Gradient]) -> dict[str, _Rows]:
    w = pointers(weight.tensor for weight in weights)
    e = w if weights[0].extra is None else pointers(weight.extra for weight in weights if weight.extra is not None)
    return {"w": w, "e": e, "g": pointers(gradient.raw for gradient in gradients)}


def _noise(updates: Sequence[Update]) -> _Rows:
    return np.array([wrap32(update.weight.noise) for update in updates], dtype=np.int64)


def _weight(weight: Weight) -> dict[str, Any]:
    return {"W": TYPES[weight.tensor.dtype], "E": TYPES[extra_type(weight.rounding, weight.tensor.dtype)],
            "KAHAN": weight.rounding == "kahan", "MASTER": weight.rounding == "master"}


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _entry(table_ptr, owner_ptr):  # type: ignore[no-untyped-def]
    """The row of the program's tensor."""
    return table_ptr + tl.load(owner_ptr + tl.program_id(0)).to(tl.int64) * _FIELDS


@triton.jit
def _numbers_at(row_ptr, field: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(row_ptr + field).to(tl.pointer_type(tl.float32))


@triton.jit
def _total(from_ptr, count, LONG: tl.constexpr):  # type: ignore[no-untyped-def]
    total = tl.zeros((LONG,), tl.float32)
    for begin in range(0, count, LONG):
        at = begin + tl.arange(0, LONG)
        total += tl.load(from_ptr + at, mask=at < count, other=0)
    return tl.sum(total, 0)


@triton.jit
def _read_gradient(g_ptr, at, mask, scale_ptr, limit, SCALED: tl.constexpr, LIMITED: tl.constexpr):  # type: ignore
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
    if SCALED:
        g = g * tl.load(scale_ptr)
    if LIMITED:
        g = tl.where(g > limit, limit, tl.where(g < -limit, -limit, g))
    return g


@triton.jit
def _read_weight(w_ptr, e_ptr, at, mask, KAHAN: tl.constexpr, MASTER: tl.constexpr):  # type: ignore[no-untyped-def]
    w = tl.load(e_ptr + at, mask=mask, other=0) if MASTER else tl.load(w_ptr + at, mask=mask, other=0).to(tl.float32)
    if KAHAN:
        w += tl.load(e_ptr + at, mask=mask, other=0).to(tl.float32)
    return w


@triton.jit
def _moments(table_ptr, owner_ptr, scale_ptr, limit, W: tl.constexpr, E: tl.constexpr,  # type: ignore
             G: tl.constexpr, KAHAN: tl.constexpr, MASTER: tl.constexpr, SCALED: tl.constexpr, LIMITED: tl.constexpr,
             ALIGNED: tl.constexpr, DOWN: tl.constexpr = DOWN, ACROSS: tl.constexpr = ACROSS,
             STEP: tl.constexpr = STEP):
    row_ptr = _entry(table_ptr, owner_ptr)
    block = tl.program_id(0) - tl.load(row_ptr + _FIRST_BLOCK)
    m, n = tl.load(row_ptr + _M).to(tl.int32), tl.load(row_ptr + _N)
    w_ptr = tl.load(row_ptr + _W).to(tl.pointer_type(W))
    e_ptr = tl.load(row_ptr + _E).to(tl.pointer_type(E))
    g_ptr = tl.load(row_ptr + _G).to(tl.pointer_type(G))
    if ALIGNED:
        n, w_ptr = tl.multiple_of(n, 16), tl.multiple_of(w_ptr, 16)
        e_ptr, g_ptr = tl.multiple_of(e_ptr, 16), tl.multiple_of(g_ptr, 16)
    across = tl.cdiv(n, ACROSS)
    strip, first = block % across, (block // across * DOWN).to(tl.int32)
    columns = strip * ACROSS + tl.arange(0, ACROSS)
    column_sum = tl.zeros((ACROSS,), tl.float32)
    square = tl.zeros((ACROSS,), tl.float32)
    for begin in range(first, tl.minimum(first + DOWN, m), STEP):
        rows = begin + tl.arange(0, STEP)
        at = rows[:, None] * n + columns[None, :]
        mask = (rows[:, None] < m) & (columns[None, :] < n)
        g = _read_gradient(g_ptr, at, mask, scale_ptr, limit, SCALED, LIMITED)
        column_sum += tl.sum(g * g, 0)
        tl.store(_numbers_at(row_ptr, _ROW_SUMS) + strip * m + rows, tl.sum(g * g, 1), mask=rows < m)
        w = _read_weight(w_ptr, e_ptr, at, mask, KAHAN, MASTER)
        square += tl.sum(w * w, 0)
    tl.store(_numbers_at(row_ptr, _COLUMN_SUMS) + block // across * n + columns, column_sum, mask=columns < n)
    tl.store(_numbers_at(row_ptr, _SQUARES) + block, tl.sum(square, 0))


@triton.jit
def _average(sums_ptr, count, width, size, state_ptr, factor_ptr, at, beta, fresh, DEEP: tl.constexpr,  # type: ignore
             WIDE: tl.constexpr):
    """The new mean squares of some rows or columns, from the sums of so many blocks; and 1/√ of each."""
    total = tl.zeros((WIDE,), tl.float32)
    for begin in range(0, count, DEEP):
        deep = begin + tl.arange(0, DEEP)
        mask = (deep[:, None] < count) & (at[None, :] < width)
        total += tl.sum(tl.load(sums_ptr + deep[:, None] * width + at[None, :], mask=mask, other=0), 0)
    state = tl.load(state_ptr + at, mask=at < width, other=0) * beta + (total / size + _TINY) * fresh
    tl.store(state_ptr + at, state, mask=at < width)
    tl.store(factor_ptr + at, 1 / tl.sqrt_rn(state), mask=at < width)
    return state


@triton.jit
def _means(table_ptr, owner_ptr, beta, fresh, DOWN: tl.constexpr = DOWN, ACROSS: tl.constexpr = ACROSS,  # type: ignore
           DEEP: tl.constexpr = DEEP, WIDE: tl.constexpr = WIDE):
    row_ptr = _entry(table_ptr, owner_ptr)
    m, n = tl.load(row_ptr + _M), tl.load(row_ptr + _N)
    chunk = tl.program_id(0) - tl.load(row_ptr + _FIRST_CHUNK)
    row_chunks = tl.cdiv(m, WIDE)
    if chunk < row_chunks:
        at = chunk * WIDE + tl.arange(0, WIDE)
        _average(_numbers_at(row_ptr, _ROW_SUMS), tl.cdiv(n, ACROSS).to(tl.int32), m, n,
                 _numbers_at(row_ptr, _ROW_STATE), _numbers_at(row_ptr, _ROW), at, beta, fresh, DEEP, WIDE)
    else:
        at = (chunk - row_chunks) * WIDE + tl.arange(0, WIDE)
        state = _average(_numbers_at(row_ptr, _COLUMN_SUMS), tl.cdiv(m, DOWN).to(tl.int32), n, m,
                         _numbers_at(row_ptr, _COLUMN_STATE), _numbers_at(row_ptr, _COLUMN), at, beta, fresh, DEEP,
                         WIDE)
        tl.store(_numbers_at(row_ptr, _MEANS) + chunk - row_chunks, tl.sum(tl.where(at < n, state, 0.0), 0))


@triton.jit
def _root_of_mean(row_ptr, n, WIDE: tl.constexpr, LONG: tl.constexpr):  # type: ignore[no-untyped-def]
    """√(mean c), which the factors of the columns lack."""
    return tl.sqrt_rn(_total(_numbers_at(row_ptr, _MEANS), tl.cdiv(n, WIDE), LONG) / n)


@triton.jit
def _energy(table_ptr, owner_ptr, scale_ptr, limit, G: tl.constexpr, SCALED: tl.constexpr,  # type: ignore
            LIMITED: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr = ROWS,
            COLUMNS: tl.constexpr = COLUMNS, WIDE: tl.constexpr = WIDE):
    row_ptr = _entry(table_ptr, owner_ptr)
    block = tl.program_id(0) - tl.load(row_ptr + _FIRST_TILE)
    m, n = tl.load(row_ptr + _M), tl.load(row_ptr + _N).to(tl.int32)
    g_ptr = tl.load(row_ptr + _G).to(tl.pointer_type(G))
    if ALIGNED:
        n, g_ptr = tl.multiple_of(n, 16), tl.multiple_of(g_ptr, 16)
    rows = block * ROWS + tl.arange(0, ROWS)
    row = tl.load(_numbers_at(row_ptr, _ROW) + rows, mask=rows < m, other=0)
    if not WHOLE:
        row *= _root_of_mean(row_ptr, n, WIDE, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, n, COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        mask = (rows[:, None] < m) & (columns[None, :] < n)
        g = _read_gradient(g_ptr, rows[:, None] * n + columns[None, :], mask, scale_ptr, limit, SCALED, LIMITED)
        column = tl.load(_numbers_at(row_ptr, _COLUMN) + columns, mask=columns < n, other=0)
        u = g * row[:, None] * column[None, :]
        total += u * u
    tl.store(_numbers_at(row_ptr, _ENERGIES) + block, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _shrink_and_size(squares, energy, count, lr, weight_decay):  # type: ignore[no-untyped-def]
    """1 − αλ and α / max(1, RMS u); NaN stays NaN, which `tl.maximum` would lose."""
    rms, scale = tl.sqrt_rn(energy / count), tl.sqrt_rn(squares / count)
    alpha = tl.where(scale < 1e-3, 1e-3, scale) * lr
    return 1 - alpha * weight_decay, alpha / tl.where(rms < 1, 1.0, rms)


@triton.jit
def _sizes(table_ptr, lr, weight_decay, DOWN: tl.constexpr = DOWN, ACROSS: tl.constexpr = ACROSS,  # type: ignore
           ROWS: tl.constexpr = ROWS, WIDE: tl.constexpr = WIDE, LONG: tl.constexpr = LONG):
    row_ptr = table_ptr + tl.program_id(0) * _FIELDS
    m, n = tl.load(row_ptr + _M).to(tl.int32), tl.load(row_ptr + _N).to(tl.int32)
    squares = _total(_numbers_at(row_ptr, _SQUARES), tl.cdiv(m, DOWN) * tl.cdiv(n, ACROSS), LONG)
    energy = _total(_numbers_at(row_ptr, _ENERGIES), tl.cdiv(m, ROWS), LONG)
    shrink, size = _shrink_and_size(squares, energy, m.to(tl.float32) * n, lr, weight_decay)
    tl.store(_numbers_at(row_ptr, _NUMBERS), shrink)
    size *= _root_of_mean(row_ptr, n, WIDE, LONG)
    for begin in range(0, m, LONG):
        at = begin + tl.arange(0, LONG)
        factor_ptr = _numbers_at(row_ptr, _ROW) + at
        tl.store(factor_ptr, tl.load(factor_ptr, mask=at < m, other=0) * size, mask=at < m)


@triton.jit
def _vectors(table_ptr, beta, fresh, lr, weight_decay, scale_ptr, limit, W: tl.constexpr,  # type: ignore
             E: tl.constexpr, G: tl.constexpr, KAHAN: tl.constexpr, MASTER: tl.constexpr, SCALED: tl.constexpr,
             LIMITED: tl.constexpr, LONG: tl.constexpr = LONG):
    row_ptr = table_ptr + tl.program_id(0) * _FIELDS
    n = tl.load(row_ptr + _N).to(tl.int32)
    w_ptr = tl.load(row_ptr + _W).to(tl.pointer_type(W))
    e_ptr = tl.load(row_ptr + _E).to(tl.pointer_type(E))
    g_ptr = tl.load(row_ptr + _G).to(tl.pointer_type(G))
    square = tl.zeros((LONG,), tl.float32)
    energy = tl.zeros((LONG,), tl.float32)
    for begin in range(0, n, LONG):
        at = begin + tl.arange(0, LONG)
        mask = at < n
        g = _read_gradient(g_ptr, at, mask, scale_ptr, limit, SCALED, LIMITED)
        w = _read_weight(w_ptr, e_ptr, at, mask, KAHAN, MASTER)
        v_ptr = _numbers_at(row_ptr, _ROW) + at
        v = tl.load(v_ptr, mask=mask, other=1) * beta + (g * g + _TINY) * fresh
        tl.store(v_ptr, v, mask=mask)
        square += w * w
        energy += tl.where(mask, g * g / v, 0.0)
    shrink, size = _shrink_and_size(tl.sum(square, 0), tl.sum(energy, 0), n.to(tl.float32), lr, weight_decay)
    tl.store(_numbers_at(row_ptr, _COLUMN), shrink)
    tl.store(_numbers_at(row_ptr, _NUMBERS), size)
