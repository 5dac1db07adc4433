"""The C++ of formulas: loops over the tensors of a table, as plain C behind pointers, without torch's headers.

A table has a row a tensor: its sizes, where its noise begins, its addresses. What all share comes by arguments.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any, NamedTuple

import torch

from collie_lab.optim.engine import Formula
from collie_lab.optim.rounding import MULTIPLIER_1, MULTIPLIER_2, compute_dtype
from collie_lab.optim.trace import FACTORS, VECTOR, C, is_flat, trace

__all__ = ["Kind", "Loops", "write_factored", "write_loop", "write_sums"]

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++17")
# Loops over fp32 wait for memory, and an EPYC feeds vectors of 256 bits faster than those of 512 (SGD by a fifth); what
# rounds bf16 has more to compute, and gains by the width.
_NARROW = ("-mprefer-vector-width=256",) if platform.machine() in ("x86_64", "AMD64") else ()
# From so many elements on, several threads are worth their start.
_PARALLEL = 2**16
# Up to so many operations an element, a loop over fp32 waits at every page for its first lines (SGD has 3, with
# momentum 5 or 7). Lion, with 12, has enough to compute meanwhile, and loses 4% by calling for them.
_LIGHT = 8
_CTYPES = {"float": ctypes.c_float, "double": ctypes.c_double}
_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16"}

_HEAD = f"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
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
// Thread t of several takes the lines from `begin` to `end`.
template <class Part> static inline void split(long m, int threads, Part part) {{
  if (threads == 1) return part(0, m, 0);
  #pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) part(m * t / threads, m * (t + 1) / threads, t);
}}
static inline int worth(int threads, long m, long n) {{ return m * n < {_PARALLEL} ? 1 : threads; }}
// A core fetches ahead of a loop, but not beyond a page. This calls for the first lines of the page after next.
constexpr uintptr_t PAGE = 4096;
static inline void fetch_ahead(const void* at) {{
  const char* line = (const char*)((uintptr_t(at) & -PAGE) + 2 * PAGE);
  for (int i = 0; i < 8; ++i) __builtin_prefetch(line + 64 * i, 0, 2);
}}
"""
_TENSOR = "struct Tensor { long m, n, noise; W* w; E* e; const G* g; };  // what every row of a table begins with\n"
_READ = {"exact": "read(w[i])", "stochastic": "read(w[i])", "kahan": "read(w[i]) + read(e[i])", "master": "e[i]"}
_GRADIENT = {True: "clip(T(read(g[i])), scale, limit)", False: "T(read(g[i]))"}
_WRITE = {
    "exact": "write(w[i], {0});",
    "stochastic": "write_at_random(w[i], {0}, noise + uint32_t(i));",
    "kahan": "write(w[i], {0}); write(e[i], {0} - read(w[i]));",
    "master": "e[i] = {0}; write(w[i], {0});",
}
# The loop proper stands in a function of its own: inside an OpenMP region the compiler loses sight of `restrict`,
# and code is ten times slower.
_PART = """
static __attribute__((noinline)) void part(
    long begin, long end, long n, W* __restrict w, E* __restrict e, const G* __restrict g, T scale, T limit,
    uint32_t noise{operands}{scalars}) {{
  {numbers}
{lines}
}}
"""
_FLAT = """  #pragma omp simd
  for (long i = begin; i < end; ++i) {{
    {body}
  }}"""
_BY_ROWS = """  for (long r = begin; r < end; ++r) {{
    {columns}
    #pragma omp simd
    for (long c = 0; c < n; ++c) {{
    const long i = r * n + c;
    {body}
    }}
  }}"""
_RUN = """
struct Row : Tensor {{ {fields} }};
extern "C" void run(const Row* row, long count, int threads, T scale, T limit{parameters}) {{
  for (; count--; ++row)
    split(row->m, worth(threads, row->m, row->n), [=](long begin, long end, int) {{
      {pieces}
    }});
}}
"""
_CALL = "part(begin, {end}, row->n, row->w, row->e, row->g, scale, limit, row->noise{arguments});"
_BY_PAGES = """for (long next; begin < end; begin = next) {{
        const long page = PAGE / sizeof(W), bytes = PAGE - uintptr_t(row->w + begin) % PAGE;
        next = std::min(end, begin + (bytes + long(sizeof(W)) - 1) / long(sizeof(W)));
        if (next + 2 * page < end) {{ {fetch} }}
        {call}
      }}"""
# Every thread adds up the columns of its own rows.
_SUMS = """
static __attribute__((noinline)) double add_squares(
    long begin, long end, long n, const W* __restrict w, const E* __restrict e, const G* __restrict g, T scale,
    T limit, T* __restrict row, T* __restrict column) {
  double squares = 0;
  for (long c = 0; c < n; ++c) column[c] = 0;
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
    squares += square;
  }
  return squares;
}
static __attribute__((noinline)) double add_energy(
    long begin, long end, long n, const G* __restrict g, T scale, T limit, const T* __restrict row,
    const T* __restrict column) {
  double energy = 0;
  for (long r = begin; r < end; ++r) {
    T sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (long c = 0; c < n; ++c) {
      const long i = r * n + c;
      const T u = {gradient} * row[r] * column[c];
      sum += u * u;
    }
    energy += sum;
  }
  return energy;
}
static double total(const std::vector<double>& parts) {  // in the order of threads
  double sum = 0;
  for (double part : parts) sum += part;
  return sum;
}
// The sums of g² along rows [m] and columns [n], of which there is one for each thread, and that of θ².
extern "C" double moments(long m, long n, int threads, const W* w, const E* e, const G* g, T scale, T limit, T* row,
                          T* column) {
  threads = worth(threads, m, n);
  std::vector<double> squares(threads);
  split(m, threads, [&](long begin, long end, int t) {
    squares[t] = add_squares(begin, end, n, w, e, g, scale, limit, row, column + t * n);
  });
  for (int t = 1; t < threads; ++t)
    for (long c = 0; c < n; ++c) column[c] += column[t * n + c];
  return total(squares);
}
extern "C" double energy(long m, long n, int threads, const G* g, T scale, T limit, const T* row, const T* column) {
  threads = worth(threads, m, n);
  std::vector<double> energies(threads);
  split(m, threads, [&](long begin, long end, int t) {
    energies[t] = add_energy(begin, end, n, g, scale, limit, row, column);
  });
  return total(energies);
}
"""
_FACTORED = """
struct Numbers {{ T shrink, size; }};
static Numbers numbers(double squares, double energy, double count, T lr, T weight_decay) {{  // NaN stays NaN
  const T rms = std::sqrt(energy / count), scale = std::sqrt(squares / count);
  const T alpha = (scale < T(1e-3) ? T(1e-3) : scale) * lr;
  return {{1 - alpha * weight_decay, alpha / (rms < 1 ? T(1) : rms)}};
}}
static inline void average(T& state, T q, T beta, T fresh) {{ state = state * beta + (q + T(1e-30)) * fresh; }}
struct Matrix : Tensor {{ T *state, *columns; }};
struct Vector : Tensor {{ T* state; }};
namespace matrix {{ {matrix} }}
extern "C" void matrices(const Matrix* row, long count, int threads, T scale, T limit, T beta, T fresh, T lr,
                         T weight_decay, T* scratch) {{
  for (; count--; ++row) {{
    const long m = row->m, n = row->n;
    T* const rows = scratch;
    T* const columns = rows + m;
    const double squares = moments(m, n, threads, row->w, row->e, row->g, scale, limit, rows, columns);
    double mean = 0;
    for (long c = 0; c < n; ++c) {{
      average(row->columns[c], columns[c] / m, beta, fresh);
      mean += row->columns[c];
    }}
    mean /= n;
    for (long c = 0; c < n; ++c) columns[c] = 1 / std::sqrt(row->columns[c] / T(mean));
    for (long r = 0; r < m; ++r) {{
      average(row->state[r], rows[r] / n, beta, fresh);
      rows[r] = 1 / std::sqrt(row->state[r]);
    }}
    Numbers of = numbers(squares, energy(m, n, threads, row->g, scale, limit, rows, columns), double(m) * n, lr,
                         weight_decay);
    for (long r = 0; r < m; ++r) rows[r] *= of.size;
    split(m, worth(threads, m, n), [&](long begin, long end, int) {{
      matrix::part(begin, end, n, row->w, row->e, row->g, scale, limit, row->noise, rows, columns, &of.shrink);
    }});
  }}
}}
namespace vector {{ {vector} }}
extern "C" void vectors(const Vector* row, long count, int, T scale, T limit, T beta, T fresh, T lr,
                        T weight_decay, T*) {{
  for (; count--; ++row) {{
    const W* const w = row->w;
    const E* const e = row->e;
    const G* const g = row->g;
    double squares = 0, energy = 0;
    for (long i = 0; i < row->m; ++i) {{
      const T gradient = {gradient}, weight = {read}, q = gradient * gradient;
      average(row->state[i], q, beta, fresh);
      squares += weight * weight;
      energy += q / row->state[i];
    }}
    Numbers of = numbers(squares, energy, row->m, lr, weight_decay);
    vector::part(0, row->m, 1, row->w, row->e, row->g, scale, limit, row->noise, row->state, &of.shrink, &of.size);
  }}
}}
"""
_Operands = tuple[tuple[str, str], ...]
_Traced = tuple[list[tuple[str, str]], str, dict[str, str]]  # what `trace` returns


class Kind(NamedTuple):
    """What the tensors of a table have in common: their types, how weights are kept, whether gradients are clipped."""

    rounding: str
    weight: torch.dtype
    gradient: torch.dtype
    clipped: bool

    @property
    def compute(self) -> str:
        """The C++ type of the computation."""
        return _TYPES[compute_dtype(self.weight)]

    @property
    def number(self) -> Any:
        """Its ctypes type."""
        return _CTYPES[self.compute]

    def file(self, source: str) -> Loops:
        """A whole file."""
        types = {"T": self.compute, "W": _TYPES[self.weight], "G": _TYPES[self.gradient],
                 "E": "bf16" if self.rounding == "kahan" else self.compute}
        lines = "".join(f"typedef {name} {short};\n" for short, name in types.items())
        return Loops(_HEAD + lines + _TENSOR + source,
                     _FLAGS if torch.bfloat16 in (self.weight, self.gradient) else (*_FLAGS, *_NARROW))


class Loops(NamedTuple):
    """A C++ file, and the compiler's flags."""

    source: str
    flags: tuple[str, ...]


def write_loop(formula: Formula, kind: Kind, operands: _Operands, scalars: tuple[str, ...]) -> Loops:
    """`run`, the loop of a formula; `operands` are (name, full | row | column | number).

    Its table: m, n, noise, weight, extra, gradient, operands. Where no operand is a row or a column, n is 1.
    """
    traced = _trace(formula, operands, scalars)
    arguments = "".join([*[f", row->o[{at}]" for at in range(len(operands))], *[f", s_{name}" for name in scalars]])
    pieces = _CALL.format(end="end", arguments=arguments)
    if is_flat(operands) and kind.weight == kind.gradient == torch.float32 and len(traced[0]) <= _LIGHT:
        tensors = ["w", "g", *[f"o[{at}]" for at, (_, lies) in enumerate(operands) if lies == "full"]]
        pieces = _BY_PAGES.format(fetch=" ".join(f"fetch_ahead(row->{tensor} + begin);" for tensor in tensors),
                                  call=_CALL.format(end="next", arguments=arguments))
    return kind.file(_part(traced, kind, operands, scalars) + _RUN.format(
        fields=f"T* o[{len(operands)}];" if operands else "",
        parameters="".join(f", T s_{name}" for name in scalars), pieces=pieces))


def write_sums(kind: Kind) -> Loops:
    """`moments` and `energy`, see `Engine`."""
    return kind.file(_sums(kind))


def write_factored(matrix: Formula, vector: Formula, kind: Kind) -> Loops:
    """`matrices` and `vectors`, all of AdaLomo's update; the formulas are those of its last pass.

    Tables: m, n, noise, weight, extra, gradient, row and column means; of a vector: v. The scratch of matrices has
    m + n · threads numbers.
    """
    return kind.file(_sums(kind) + _FACTORED.format(
        matrix=_part(_trace(matrix, FACTORS), kind, FACTORS), vector=_part(_trace(vector, VECTOR), kind, VECTOR),
        gradient=_GRADIENT[kind.clipped], read=_READ[kind.rounding]))


def _trace(formula: Formula, operands: _Operands, scalars: tuple[str, ...] = ()) -> _Traced:
    return trace(formula, tuple(name for name, _ in operands), scalars, C)


def _part(traced: _Traced, kind: Kind, operands: _Operands, scalars: tuple[str, ...] = ()) -> str:
    """`part`, the loop over some lines of one tensor."""
    statements, value, new = traced
    body = [f"const T weight = {_READ[kind.rounding]};", f"const T gradient = {_GRADIENT[kind.clipped]};"]
    body += [_load(name, "i") for name, lies in operands if lies == "full"]
    body += [_load(name, "c") for name, lies in operands if lies == "row"]
    body += [f"const auto {name} = {expression};" for name, expression in statements]
    body += [f"o_{name}_at[i] = {state};" for name, state in new.items()]
    body.append(_WRITE[kind.rounding].format(value))
    return _PART.format(
        operands="".join(f", T* __restrict o_{name}_at" for name, _ in operands),
        scalars="".join(f", T s_{name}" for name in scalars),
        numbers=" ".join(_load(name, "0") for name, lies in operands if lies == "number"),
        lines=(_FLAT if is_flat(operands) else _BY_ROWS).format(
            body="\n    ".join(body),
            columns=" ".join(_load(name, "r") for name, lies in operands if lies == "column")))


def _load(operand: str, place: str) -> str:
    return f"const T o_{operand} = o_{operand}_at[{place}];"


def _sums(kind: Kind) -> str:
    return _SUMS.replace("{gradient}", _GRADIENT[kind.clipped]).replace("{read}", _READ[kind.rounding])
