"""How bf16 weights are kept, so that small updates are not lost.

bf16 has 8 bits of precision: an update below 1/512 of a weight vanishes by rounding to nearest. Three remedies:

- `stochastic`: round up or down at random, right on average; no memory (Zamirai et al., arXiv 2010.06192).
- `kahan`: what rounding cuts off is kept in a second bf16 number and added again in the next step.
- `master`: an fp32 copy takes the updates; the bf16 weight is its rounded image.

Weights in fp32 and float64 are `exact`: nothing is rounded.

The noise of stochastic rounding is a hash of (seed, step, parameter, place in the whole tensor): no random state
to keep, the same whatever the order of updates, and the same on one process and on shards of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ROUNDINGS", "Weight", "compute_dtype", "hash32", "nearest", "noise_keys", "read_weight", "wrap32",
           "write_weight"]

ROUNDINGS = ("stochastic", "kahan", "master")

# The two multipliers of Chris Wellons' `lowbias32` hash, the second as a signed number.
MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB352D, 0x846CA68B - 2**32


class Weight(NamedTuple):
    """The local piece of a parameter, and how it is read and written.

    Attributes:
        tensor: in the parameter's own type.
        rounding: `exact`, or one of `ROUNDINGS`.
        extra: the master copy (fp32) or the compensation (bf16), of the same shape; else None.
        noise: where the noise of this piece begins.
    """

    tensor: Tensor
    rounding: str = "exact"
    extra: Tensor | None = None
    noise: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The type of the computation."""
        return compute_dtype(self.tensor.dtype)

    def read(self) -> Tensor:
        """The weight in the type of the computation."""
        return read_weight(self.tensor, self.extra, self.rounding)

    def write(self, value: Tensor) -> None:
        """Round and store."""
        index = None
        if self.rounding == "stochastic":
            index = torch.arange(value.numel(), dtype=torch.int32, device=value.device).view(value.shape)
            index += wrap32(self.noise)
        write_weight(value, self.tensor, self.extra, self.rounding, index)

    def flat(self) -> Weight:
        """The same as one row."""
        return self._replace(tensor=self.tensor.view(-1), extra=None if self.extra is None else self.extra.view(-1))

    def at(self, index: tuple[int, ...]) -> Weight:
        """The part with the given leading indices."""
        tensor, before = self.tensor[index], 0
        for at, size in zip(index, self.tensor.shape, strict=False):
            before = before * size + at
        return self._replace(tensor=tensor, noise=self.noise + before * tensor.numel(),
                             extra=None if self.extra is None else self.extra[index])

    def part(self, begin: int, end: int) -> Weight:
        """The slices from `begin` to `end` of the first dimension."""
        size = self.tensor[0].numel() if self.tensor.shape[0] else 0
        return self._replace(tensor=self.tensor[begin:end], noise=self.noise + begin * size,
                             extra=None if self.extra is None else self.extra[begin:end])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def read_weight(tensor: Tensor, extra: Tensor | None, rounding: str) -> Tensor:
    """What `write_weight` stored, in the type of the computation."""
    if rounding == "master":
        assert extra is not None
        return extra
    value = tensor.to(compute_dtype(tensor.dtype))
    if rounding == "kahan":
        assert extra is not None
        return value + extra.to(value.dtype)
    return value


def write_weight(value: Tensor, tensor: Tensor, extra: Tensor | None, rounding: str, index: Tensor | None) -> None:
    """Store `value` in `tensor` and `extra`; `index` (int32) is the place of each element in the noise."""
    if rounding == "stochastic":
        assert index is not None
        bits = (value.view(torch.int32) + (hash32(index) & 0xFFFF)) & -0x10000
        # NaN plus noise may overflow to a number.
        value = torch.where(torch.isnan(value), value, bits.view(torch.float32))
    elif rounding == "kahan":
        assert extra is not None
        rounded = nearest(value) if torch.compiler.is_compiling() else value.to(tensor.dtype)
        extra.copy_(value - rounded.to(value.dtype))
        value = rounded
    elif rounding == "master":
        assert extra is not None
        extra.copy_(value)
    tensor.copy_(value)


def nearest(value: Tensor) -> Tensor:
    """The nearest numbers of bf16, ties to even, in fp32 and by whole numbers: fp32 → bf16 → fp32 is nothing to some
    compilers (torch 2.11 on CPUs, whatever its options say), and so would be what rounding cuts off."""
    bits = value.view(torch.int32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return torch.where(torch.isnan(value), value, bits.view(torch.float32))


def hash32(index: Tensor) -> Tensor:
    """A hash of 32-bit integers with little bias (Wellons' lowbias32); `>>` must not carry the sign in."""
    x = index ^ ((index >> 16) & 0xFFFF)
    x = x * MULTIPLIER_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * MULTIPLIER_2
    return x ^ ((x >> 16) & 0xFFFF)


def noise_keys(seed: int, steps: NDArray[np.uint64], parameters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where the noise of one update of each of some parameters begins: far from all others."""
    # splitmix64 (Steele et al. 2014), over the three numbers in turn; it overflows on purpose.
    x: NDArray[Any] = np.zeros(len(steps), dtype=np.uint64)
    for numbers in (np.uint64(seed % 2**64), steps, parameters):
        x = x + numbers + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
        x ^= x >> 31
    return x & np.uint64(0xFFFFFFFF)


def wrap32(number: int) -> int:
    """The signed 32-bit number with the same last 32 bits."""
    return (number + 2**31) % 2**32 - 2**31
