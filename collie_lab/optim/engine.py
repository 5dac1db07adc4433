"""How updates are computed: four engines with one contract and, up to rounding, one result.

- `Eager`: torch operations on pieces that fit the cache (CPU) or bound the temporaries (GPU). The reference.
- `Compiled`: torch.compile of the same formulas, for devices that have neither of the following.
- `native.Native`: one C++ loop a formula, for CPUs.
- `kernels.Triton`: one kernel template, for CUDA.
"""

from __future__ import annotations

import functools
import subprocess
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from collie_lab.optim.rounding import Weight, read_weight, wrap32, write_weight
from collie_lab.optim.rule import Gradient, Scalars, States, Update, clip

if TYPE_CHECKING:
    from collie_lab.optim.updates import Updates

__all__ = ["ENGINES", "Compiled", "Eager", "Engine", "Formula", "choose_engine"]

ENGINES = ("auto", "eager", "compile", "native", "triton")

# Smaller tensors are left to torch's own operations: a call of compiled code costs 50 to 100 µs.
_SMALL = 4096


class Formula(Protocol):
    """What every engine can compute: a new weight and new states from the old, element by element."""

    def update(self, weight: Tensor, gradient: Tensor, states: States, scalars: Scalars) -> tuple[Tensor, States]:
        """See `Rule.update`."""

    def __hash__(self) -> int:
        """Compiled code is kept by formula."""


class Engine(ABC):
    """Computes updates in place. Operands are local, dense tensors."""

    together: bool = False
    """Whether many updates at once cost it less than one after the other."""
    keeps: bool = False
    """Whether it keeps what it finds out of tensors from step to step: see `Updates.kept`."""

    @abstractmethod
    def elementwise(self, formula: Formula, weight: Weight, gradient: Gradient, operands: States,
                    scalars: Scalars) -> None:
        """Write `formula`'s new weight, and its new states into `operands`.

        Operands that are not written may also be a column [m, 1], a row [1, n] or a number [] beside a
        weight [m, n].
        """

    def elementwise_all(self, formula: Formula, updates: Updates, scalars: Scalars) -> None:
        """The same for many parameters; an engine may have a faster way than one after the other."""
        for weight, gradient, states, _ in updates:
            self.elementwise(formula, weight, gradient, states, scalars)

    def factored(self, matrix: Formula, vector: Formula, updates: Updates, scalars: Scalars) -> Iterable[Update]:
        """Make AdaLomo's whole updates where the engine has kernels of its own for them; those that it leaves.

        `matrix` and `vector` are the formulas of the last pass.
        """
        return updates

    @abstractmethod
    def moments(self, weight: Weight, gradient: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        """Of matrices [m, n]: the sums of g² along rows [m] and columns [n], and the sum of θ² []."""

    @abstractmethod
    def energy(self, gradient: Gradient, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum [] of (g · row · column)², g [m, n], row [m], column [n]."""


class Eager(Engine):
    """Torch operations, piece by piece."""

    def __init__(self, device: torch.device):
        # 128 Ki fp32 numbers and their temporaries stay in a core's cache; on a GPU, launches cost more than traffic.
        self._piece = 2**17 if device.type == "cpu" else 2**26

    @override
    def elementwise(self, formula: Formula, weight: Weight, gradient: Gradient, operands: States,
                    scalars: Scalars) -> None:
        shape = weight.tensor.shape
        raw = gradient.raw
        if all(tensor.is_contiguous() and tensor.shape == shape for tensor in (weight.tensor, raw, *operands.values())):
            weight, raw = weight.flat(), raw.view(-1)
            operands = {name: tensor.view(-1) for name, tensor in operands.items()}
        elif not weight.tensor.ndim:
            _elementwise(formula, weight, gradient, operands, scalars)
            return
        rows = weight.tensor.shape[0]
        step = max(1, self._piece * rows // max(1, weight.tensor.numel()))
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            pieces = {name: tensor[begin:end] if tensor.ndim and tensor.shape[0] == rows else tensor
                      for name, tensor in operands.items()}
            _elementwise(formula, weight.part(begin, end), gradient.on(raw[begin:end]), pieces, scalars)

    @override
    def moments(self, weight: Weight, gradient: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        dtype, (m, n) = weight.dtype, weight.tensor.shape
        row = torch.empty(m, dtype=dtype, device=weight.tensor.device)
        column, square = row.new_zeros(n), row.new_zeros(())
        for begin, end in self._row_pieces(m, n):
            q = gradient.on(gradient.raw[begin:end]).read(dtype).square()
            torch.sum(q, 1, out=row[begin:end])
            column += q.sum(0)
            value = weight.part(begin, end).read().flatten()
            square += torch.dot(value, value)
        return row, column, square

    @override
    def energy(self, gradient: Gradient, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        total = row.new_zeros(())
        for begin, end in self._row_pieces(*gradient.raw.shape):
            u = (gradient.on(gradient.raw[begin:end]).read(dtype) * row[begin:end, None] * column).flatten()
            total += torch.dot(u, u)
        return total

    def _row_pieces(self, m: int, n: int) -> list[tuple[int, int]]:
        step = max(1, self._piece // max(1, n))
        return [(begin, min(begin + step, m)) for begin in range(0, m, step)]


class Compiled(Engine):
    """torch.compile of each formula; small and non-contiguous tensors go the eager way."""

    def __init__(self, device: torch.device):
        self._device, self._eager = device, Eager(device)

    @override
    def elementwise(self, formula: Formula, weight: Weight, gradient: Gradient, operands: States,
                    scalars: Scalars) -> None:
        tensors = (weight.tensor, gradient.raw, *operands.values())
        if weight.tensor.numel() < _SMALL or not all(tensor.is_contiguous() for tensor in tensors):
            self._eager.elementwise(formula, weight, gradient, operands, scalars)
            return
        raw = gradient.raw
        if all(tensor.shape == weight.tensor.shape for tensor in tensors):
            weight, raw = weight.flat(), raw.view(-1)
            operands = {name: tensor.view(-1) for name, tensor in operands.items()}
        run = _compiled_elementwise(formula, weight.rounding, tuple(operands), tuple(scalars))
        numbers = [_number(value, weight.dtype) for value in scalars.values()]
        noise = torch.tensor(wrap32(weight.noise), dtype=torch.int32, device=self._device)
        run(weight.tensor, weight.extra, raw, _scale(gradient, weight.dtype), _limit(gradient, weight.dtype), noise,
            *operands.values(), *numbers)

    @override
    def moments(self, weight: Weight, gradient: Gradient) -> tuple[Tensor, Tensor, Tensor]:
        if weight.tensor.numel() < _SMALL:
            return self._eager.moments(weight, gradient)
        result: tuple[Tensor, Tensor, Tensor] = _compiled_moments(weight.rounding)(
            weight.tensor, weight.extra, gradient.raw, _scale(gradient, weight.dtype), _limit(gradient, weight.dtype))
        return result

    @override
    def energy(self, gradient: Gradient, row: Tensor, column: Tensor, dtype: torch.dtype) -> Tensor:
        if gradient.raw.numel() < _SMALL:
            return self._eager.energy(gradient, row, column, dtype)
        result: Tensor = _compiled_energy()(gradient.raw, _scale(gradient, dtype), _limit(gradient, dtype), row, column)
        return result


def choose_engine(name: str, device: torch.device) -> Engine:
    """The engine of a name; `auto` takes the fastest of a device.

    Falls back to the next with a warning where a compiler is missing.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: one of {', '.join(ENGINES)}")
    if name == "auto":
        name = {"cpu": "native", "cuda": "triton"}.get(device.type, "compile")
    if name == "native":
        from collie_lab.optim.native import Native

        try:
            return Native(device)
        except (OSError, subprocess.SubprocessError) as error:
            _warn(f"the optimizer runs uncompiled, several times slower: {error}")
            name = "eager"
    if name == "triton":
        try:
            from collie_lab.optim.kernels import Triton

            return Triton(device)
        except ImportError:
            _warn("triton is not installed: the optimizer is compiled by torch instead")
            name = "compile"
        except Exception as error:  # whatever its tools raise, torch's own operations work
            _warn(f"Triton does not work here, the optimizer runs uncompiled, several times slower: {error}")
            name = "eager"
    return Compiled(device) if name == "compile" else Eager(device)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _elementwise(formula: Formula, weight: Weight, gradient: Gradient, operands: States, scalars: Scalars) -> None:
    value, new = formula.update(weight.read(), gradient.read(weight.dtype), operands, scalars)
    for name, state in new.items():
        operands[name].copy_(state)
    weight.write(value)


@functools.cache
def _compiled_elementwise(formula: Formula, rounding: str, operands: tuple[str, ...], scalars: tuple[str, ...]
                          ) -> Callable[..., None]:
    def run(tensor: Tensor, extra: Tensor | None, raw: Tensor, scale: Tensor | None, limit: Any, noise: Tensor,
            *values: Tensor) -> None:
        states = dict(zip(operands, values, strict=False))
        numbers = dict(zip(scalars, values[len(operands):], strict=True))
        weight = read_weight(tensor, extra, rounding)
        value, new = formula.update(weight, clip(raw.to(weight.dtype), scale, limit), states, numbers)
        for name, state in new.items():
            states[name].copy_(state)
        index = None
        if rounding == "stochastic":
            index = torch.arange(value.numel(), dtype=torch.int32, device=value.device).view(value.shape) + noise
        write_weight(value, tensor, extra, rounding, index)

    return _compile(run)


@functools.cache
def _compiled_moments(rounding: str) -> Callable[..., Any]:
    def run(tensor: Tensor, extra: Tensor | None, raw: Tensor, scale: Tensor | None, limit: Any) -> Any:
        value = read_weight(tensor, extra, rounding)
        q = clip(raw.to(value.dtype), scale, limit).square()
        return q.sum(1), q.sum(0), value.square().sum()

    return _compile(run)


@functools.cache
def _compiled_energy() -> Callable[..., Any]:
    def run(raw: Tensor, scale: Tensor | None, limit: Any, row: Tensor, column: Tensor) -> Tensor:
        return (clip(raw.to(row.dtype), scale, limit) * row[:, None] * column).square().sum()

    return _compile(run)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Compiled code is kept with the code object, up to a limit: closures of one function must not share it.
    function.__code__ = function.__code__.replace()  # type: ignore[attr-defined]
    # Else fp32 → bf16 → fp32 is simplified away where a formula has it; rounding does not rely on this (`nearest`).
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True, fullgraph=True,
                                                 options={"emulate_precision_casts": True})
    return compiled


@functools.lru_cache(maxsize=256)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor: as a Python float, each new learning rate would compile again."""
    return torch.tensor(value, dtype=dtype)


def _scale(gradient: Gradient, dtype: torch.dtype) -> Tensor | None:
    return None if gradient.scale is None else gradient.scale.to(dtype)


def _limit(gradient: Gradient, dtype: torch.dtype) -> Tensor | None:
    return None if gradient.limit is None else _number(gradient.limit, dtype)
