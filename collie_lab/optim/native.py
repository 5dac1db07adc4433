"""The CPU engine: every formula becomes a C++ loop, built in half a second, that moves every byte once.

The loops are plain C behind pointers, without torch's headers, and called through ctypes: a call costs a few
microseconds where compiled Python costs fifty.
"""

from __future__ import annotations

import ctypes
import functools
import math
import platform
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from collie_lab.compiler import build, find_compiler
from collie_lab.optim.engine import Eager, Engine, Formula
from collie_lab.optim.rounding import MULTIPLIER_1, MULTIPLIER_2, Weight
from collie_lab.optim.rule import Gradient, Scalars, States
from collie_lab.optim.trace import C, operand_kind, trace

__all__ = ["Loop", "Native", "write_loop"]

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++17")
# Loops over fp32 wait for memory, and an EPYC feeds vectors of 256 bits faster than those of 512 (SGD by a fifth); what
# rounds bf16 has more to compute, and gains by the width.
_NARROW = ("-mprefer-vector-width=256",) if platform.machine() in ("x86_64", "AMD64") else ()
# From so many elements on, several threads are worth their start.
_PARALLEL = 2**16
_CTYPES = {"float": ctypes.c_float, "double": ctypes.c_double}
_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16"}

_HEAD = f"""
#include <cmath>
#include <cstdint>
#include <cstring>
struct bf16 {{ uint16_t bits; }};
static inline uint32_t bits_of(float x) {{ uint32_t u; std::memcpy(&u, &x, 4); return u; }}
static inline float of_bits(uint32_t u) {{ float x; std::memcpy(&x, &u, 4); return x; }}
static inline float read(float x) {{ return x; }}
static inline double read(double x) {{ return x; }}
static inline float read(bf16 x) {{ return of_bits(uint32_t(x.bits) << 16); }}
static inline void write(float& to, float x) {{ to = x; }}
static inline void write(double& to, double x) {{ to = x; }}
static inline void write(bf16& to, float x) {{  // to nearest, ties to even; NaN stays NaN
  uint32_t u = bits_of(x);
  to.bits = x == x ? uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16) : uint16_t((u >> 16) | 0x40);
}}
static inline void write_at_random(bf16& to, float x, uint32_t h) {{  // lowbias32, as in rounding.py
  h ^= h >> 16; h *= {MULTIPLIER_1}u; h ^= h >> 15; h *= {MULTIPLIER_2 + 2**32}u; h ^= h >> 16;
  uint32_t u = bits_of(x);
  to.bits = x == x ? uint16_t((u + (h & 0xFFFF)) >> 16) : uint16_t((u >> 16) | 0x40);
}}
template <class T> static inline T clip(T g, T scale, T limit) {{
  g *= scale;
  return g > limit ? limit : g < -limit ? -limit : g;
}}
"""
_READ = {"exact": "read(w[i])", "stochastic": "read(w[i])", "kahan": "read(w[i]) + read(e[i])", "master": "e[i]"}
_GRADIENT = {True: "clip(T(read(g[i])), scale, limit)", False: "T(read(g[i]))"}
_WRITE = {
    "exact": "write(w[i], {0});",
    "stochastic": "write_at_random(w[i], {0}, noise + uint32_t(i));",
    "kahan": "write(w[i], {0}); write(e[i], {0} - read(w[i]));",
    "master": "e[i] = {0}; write(w[i], {0});",
}
# The loop proper stands in a function of its own: inside an OpenMP region the compiler loses sight of `restrict`,
# and code is ten times slower. Thread t of several takes the lines from `begin` to `end`.
_FUNCTION = """
static __attribute__((noinline)) void part(long begin, long end, long n, int t{parameters}) {{
{body}
}}
extern "C" void run(long m, long n, int threads{parameters}) {{
  if (threads == 1) return part(0, m, n, 0{names});
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) part(m * t / threads, m * (t + 1) / threads, n, t{names});
}}
"""
_INPUTS = (("{W}* __restrict", "w"), ("{E}* __restrict", "e"), ("const {G}* __restrict", "g"), ("T", "scale"),
           ("T", "limit"))
_FLAT = """  {numbers}
  #pragma omp simd
  for (long i = begin; i < end; ++i) {{
    {body}
  }}"""
_BY_ROWS = """  {numbers}
  for (long r = begin; r < end; ++r) {{
    {columns}
    #pragma omp simd
    for (long c = 0; c < n; ++c) {{
    const long i = r * n + c;
    {body}
    }}
  }}"""
_MOMENTS_OUTPUTS = [("T* __restrict", "row"), ("T* __restrict", "columns"), ("T* __restrict", "squares")]
_ENERGY_OUTPUTS = [("const T* __restrict", "row"), ("const T* __restrict", "column"), ("T* __restrict", "sums")]
# Every thread adds up the columns of its own rows; they come together in the order of threads.
_MOMENTS = """  T* __restrict column = columns + t * n;
  for (long r = begin; r < end; ++r) {
    T sum = 0, square = 0;
    #pragma omp simd reduction(+ : sum, square)
    for (long c = 0; c < n; ++c) {
      const long i = r * n + c;
      const T gradient = {gradient}, weight = {read}, q = gradient * gradient;
      sum += q;
      column[c] += q;
      square += weight * weight;
    }
    row[r] = sum;
    squares[r] = square;
  }"""
_ENERGY = """  for (long r = begin; r < end; ++r) {
    T sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (long c = 0; c < n; ++c) {
      const long i = r * n + c;
      const T u = {gradient} * row[r] * column[c];
      sum += u * u;
    }
    sums[r] = sum;
  }"""


class Native(Engine):
    """Loops for contiguous tensors on a CPU; what is not contiguous goes the eager way.

    Raises:
        OSError, SubprocessError: there is no C++ compiler, or it does not work.
    """

    def __init__(self, device: torch.device):
        self._eager = Eager(device)
        if find_compiler() is None:
            raise FileNotFoundError("there is no C++ compiler (g++ or clang++)")
        _energy(torch.float32, torch.float32, False)  # a trial

    @override
    def elementwise(self, formula: Formula, weight: Weight, gradient: Gradient, operands: States,
                    scalars: Scalars) -> None:
        w, g, e, dtype = weight.tensor, gradient.raw, weight.extra, weight.dtype
        if not _suits(w, g, *operands.values()) or any(t.dtype != dtype for t in operands.values()):
            self._eager.elementwise(formula, weight, gradient, operands, scalars)
            return
        kinds = tuple([(name, operand_kind(tensor, w)) for name, tensor in operands.items()])
        run = _elementwise(formula, weight.rounding, w.dtype, g.dtype, _is_clipped(gradient), kinds, tuple(scalars))
        n = 1 if _is_flat(kinds) else w.shape[-1]
        run(w.numel() // max(1, n), n, _threads(w), w.data_ptr(), (w if e is None else e).data_ptr(), g.data_ptr(),
            *_clip(gradient), weight.noise & 0xFFFFFFFF, *[tensor.data_ptr() for tensor in operands.values()],
            *scalars.values())

    @override
    def moments(self, weight: Weight, gradient: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        w, g, e = weight.tensor, gradient.raw, weight.extra
        if not _suits(w, g):
            return self._eager.moments(weight, gradient)
        (m, n), threads = w.shape, _threads(w)
        row, squares = torch.empty(2, m, dtype=weight.dtype).unbind()
        columns = torch.zeros(threads, n, dtype=weight.dtype)
        _moments(weight.rounding, w.dtype, g.dtype, _is_clipped(gradient))(
            m, n, threads, w.data_ptr(), (w if e is None else e).data_ptr(), g.data_ptr(), *_clip(gradient),
            row.data_ptr(), columns.data_ptr(), squares.data_ptr())
        return row, columns[0] if threads == 1 else columns.sum(0), squares.sum()

    @override
    def energy(self, gradient: Gradient, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        g = gradient.raw
        if not _suits(g, row, column):
            return self._eager.energy(gradient, row, column, dtype)
        m, n = g.shape
        sums = torch.empty(m, dtype=dtype)
        _energy(dtype, g.dtype, _is_clipped(gradient))(
            m, n, _threads(g), None, None, g.data_ptr(), *_clip(gradient), row.data_ptr(), column.data_ptr(),
            sums.data_ptr())
        return sums.sum()


class Loop(NamedTuple):
    """A C++ file with one function `run`, the ctypes of its arguments, and the compiler's flags."""

    source: str
    argtypes: list[Any]
    flags: tuple[str, ...]


def write_loop(formula: Formula, rounding: str, weight: torch.dtype, gradient: torch.dtype, clipped: bool,
               operands: tuple[tuple[str, str], ...], scalars: tuple[str, ...]) -> Loop:
    """The loop of a formula; `operands` are (name, full | row | column | number)."""
    statements, value, new = trace(formula, tuple(name for name, _ in operands), scalars, C)
    body = [f"const T weight = {_READ[rounding]};", f"const T gradient = {_GRADIENT[clipped]};"]
    body += [_load(name, "i") for name, kind in operands if kind == "full"]
    body += [_load(name, "c") for name, kind in operands if kind == "row"]
    body += [f"const auto {name} = {expression};" for name, expression in statements]
    body += [f"o_{name}_at[i] = {state};" for name, state in new.items()]
    body.append(_WRITE[rounding].format(value))
    lines = _FLAT if _is_flat(operands) else _BY_ROWS
    parameters = [("uint32_t", "noise"), *[("T* __restrict", f"o_{name}_at") for name, _ in operands],
                  *[("T", f"s_{name}") for name in scalars]]
    return _loop(lines.format(
        body="\n    ".join(body),
        numbers=" ".join(_load(name, "0") for name, kind in operands if kind == "number"),
        columns=" ".join(_load(name, "r") for name, kind in operands if kind == "column"),
    ), parameters, rounding, weight, gradient)


def _load(operand: str, place: str) -> str:
    return f"const T o_{operand} = o_{operand}_at[{place}];"


def _loop(body: str, parameters: list[tuple[str, str]], rounding: str, weight: torch.dtype, gradient: torch.dtype
          ) -> Loop:
    """A whole file from the body of its function and the parameters (type, name) that follow the inputs."""
    parameters = [*_INPUTS, *parameters]
    source = _FUNCTION.format(body=body, parameters="".join(f", {kind} {name}" for kind, name in parameters),
                              names="".join(f", {name}" for _, name in parameters))
    compute = _TYPES[torch.promote_types(weight, torch.float32)]
    extra = "bf16" if rounding == "kahan" else compute
    for field, text in {"{W}": _TYPES[weight], "{G}": _TYPES[gradient], "{E}": extra}.items():
        source = source.replace(field, text)
    argtypes = {"T": _CTYPES[compute], "uint32_t": ctypes.c_uint32}
    return Loop(f"{_HEAD}typedef {compute} T;\n{source}", [
        ctypes.c_long, ctypes.c_long, ctypes.c_int,
        *[argtypes.get(kind, ctypes.c_void_p) for kind, _ in parameters]],
        _FLAGS if torch.bfloat16 in (weight, gradient) else (*_FLAGS, *_NARROW))


@functools.cache
def _elementwise(formula: Formula, rounding: str, weight: torch.dtype, gradient: torch.dtype, clipped: bool,
                 operands: tuple[tuple[str, str], ...], scalars: tuple[str, ...]) -> Any:
    return _build(write_loop(formula, rounding, weight, gradient, clipped, operands, scalars))


@functools.cache
def _moments(rounding: str, weight: torch.dtype, gradient: torch.dtype, clipped: bool) -> Any:
    body = _MOMENTS.replace("{read}", _READ[rounding]).replace("{gradient}", _GRADIENT[clipped])
    return _build(_loop(body, _MOMENTS_OUTPUTS, rounding, weight, gradient))


@functools.cache
def _energy(dtype: torch.dtype, gradient: torch.dtype, clipped: bool) -> Any:
    body = _ENERGY.replace("{gradient}", _GRADIENT[clipped])
    return _build(_loop(body, _ENERGY_OUTPUTS, "exact", dtype, gradient))


def _build(loop: Loop) -> Any:
    function = build(loop.source, loop.flags).run
    function.restype = None
    function.argtypes = loop.argtypes
    return function


def _clip(gradient: Gradient) -> tuple[float, float]:
    """Scale and limit; what does nothing to a gradient where there is none."""
    scale = 1.0 if gradient.scale is None else float(gradient.scale)
    return scale, math.inf if gradient.limit is None else gradient.limit


def _threads(tensor: Tensor) -> int:
    return torch.get_num_threads() if tensor.numel() >= _PARALLEL else 1


def _is_clipped(gradient: Gradient) -> bool:
    return gradient.scale is not None or gradient.limit is not None


def _is_flat(operands: tuple[tuple[str, str], ...]) -> bool:
    return all(kind in ("full", "number") for _, kind in operands)


def _suits(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() and tensor.is_cpu and tensor.dtype in _TYPES for tensor in tensors)
