"""One launch for many tensors: where a kernel finds them.

A table has a row of 64-bit numbers for each tensor: its addresses and sizes. Every program of a launch is told by a
second array, the owners, which row it works on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["TYPES", "Launches", "Owners", "Table", "aligned", "blocks", "clipping", "extra_type", "on", "pointers",
           "upload"]

#: The types of weights and gradients that kernels know, in Triton's words.
TYPES: dict[torch.dtype, Any] = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

#: Bytes to which addresses and sizes must be aligned, so that a thread loads 16 bytes at once.
_ALIGNED = 16


def upload(array: NDArray[np.int64] | NDArray[np.int32], device: torch.device) -> Tensor:
    """The array on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it, the device is the current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def clipping(scale: Tensor | None, limit: float | None, stand_in: Tensor) -> tuple[Tensor, float, dict[str, bool]]:
    """What clips a gradient, as a kernel takes it: scale, limit and the constants that say which of them there are.

    Where nothing scales it, any tensor stands in for the address.
    """
    return (stand_in if scale is None else scale, float(limit or 0),
            {"SCALED": scale is not None, "LIMITED": limit is not None})


def extra_type(rounding: str, weight: torch.dtype) -> torch.dtype:
    """The type of the tensor beside a weight; where there is none, the weight stands in for it."""
    return {"kahan": torch.bfloat16, "master": torch.float32}.get(rounding, weight)


def pointers(tensors: Iterable[Tensor]) -> NDArray[np.int64]:
    """The addresses of tensors."""
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)


def aligned(numbers: NDArray[np.int64]) -> bool:
    """Whether all addresses and sizes are multiples of 16."""
    return int(np.bitwise_or.reduce(numbers, axis=None)) % _ALIGNED == 0


def blocks(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first program of each tensor, from how many each has."""
    return np.cumsum(counts) - counts


class Table(NamedTuple):
    """A table on the device."""

    rows: Tensor
    aligned: bool
    """Whether a thread may load 16 bytes of weights and gradients at once."""


class Launches:
    """Starts kernels, again and again, at a third of what Triton's own start costs the host.

    That finds the compiled kernel by what each argument specialises it for. Here a kernel's constants, which come last
    in its signature, tell that, with the types of its tensors and how they are aligned; its other arguments are floats.
    """

    def __init__(self) -> None:
        self._compiled: dict[Any, tuple[Any, tuple[None, ...]]] = {}

    def __call__(self, kernel: Any, programs: int, arguments: tuple[Tensor | float, ...], *, warps: int = 4,
                 **constants: Any) -> None:
        """On the current device, which is the same each time."""
        key = (kernel, warps, *constants.values(), *[(argument.dtype, argument.data_ptr() % _ALIGNED)
                                                     for argument in arguments if isinstance(argument, Tensor)])
        if found := self._compiled.get(key):
            compiled, places = found
            compiled[programs, 1, 1](*arguments, *places)
        # The interpreter compiles nothing.
        elif (compiled := kernel[(programs,)](*arguments, num_warps=warps, **constants)) is not None:
            # A compiled kernel has places for its constants, which it does not look at.
            self._compiled[key] = compiled, (None,) * (len(kernel.arg_names) - len(arguments))


class Owners:
    """Of every program of a launch, the row of its tensor (int32); the arrays of the last launches are kept."""

    def __init__(self, device: torch.device):
        self._device = device
        self._find = functools.lru_cache(maxsize=64)(self._make)

    def __call__(self, counts: Sequence[int]) -> Tensor:
        """From how many programs each tensor has."""
        # Memory belongs to the stream that it was first used on.
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        return self._find(tuple(counts), stream)

    def _make(self, counts: tuple[int, ...], stream: int) -> Tensor:
        return upload(np.repeat(np.arange(len(counts), dtype=np.int32), counts), self._device)
