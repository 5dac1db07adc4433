"""Statistics of gradients and weights, of the whole model in any layout."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from collie_lab.cells import Callback, GradientStatistics, Statistics
from collie_lab.optim.shards import Shards, local, local_gradient

__all__ = ["TensorStatistics"]

# What is summed over all elements: squares, zeros, what is not finite, and the elements themselves.
_SUMS = 4


class TensorStatistics(Callback):
    """Norm, root mean square, largest magnitude, and the shares of zeros and of what is not finite.

    Each rank looks at its pieces; a handful of numbers is then summed over the ranks that hold the others.
    """

    def __init__(self, cell: Statistics):
        self._cell = cell
        self._of_gradients = isinstance(cell, GradientStatistics)
        self._parameters: list[tuple[nn.Parameter, Shards, Tensor]] = []

    @override
    def on_start(self, trainer: Any) -> None:
        """Find the parameters of each group; the first group is all of them.

        Raises:
            ValueError: a group without a parameter.
        """
        patterns = [("*",), *((group,) if isinstance(group, str) else group for group in self._cell.groups.values())]
        self._stages, copies = trainer.stages
        copied = {id(parameter) for parameter in copies}
        counts = torch.zeros(len(patterns), device=trainer.device)
        for name, parameter in trainer.trained_parameters().items():
            members = torch.tensor([index for index, group in enumerate(patterns)
                                    if any(fnmatchcase(name, pattern) for pattern in group)], device=trainer.device)
            counts[members] += 1
            if id(parameter) not in copied:
                self._parameters.append((parameter, Shards(parameter), members))
        if self._stages is not None:
            dist.all_reduce(counts, group=self._stages)
        for name, count in zip(("", *self._cell.groups), counts.tolist(), strict=True):
            if not count:
                raise ValueError(f"{type(self._cell).__name__}.groups: no trained parameter's name matches "
                                 f"{self._cell.groups[name]!r}")

    @override
    def before_update(self, trainer: Any) -> None:
        if self._of_gradients:
            self._look(trainer)

    @override
    def after_step(self, trainer: Any) -> None:
        if not self._of_gradients:
            self._look(trainer)

    @torch.no_grad()
    def _look(self, trainer: Any) -> None:
        if trainer.step % self._cell.every:
            return
        sums, largest = self._totals(trainer.device)
        names = (self._cell.columns, *(f"{self._cell.columns}/{name}" for name in self._cell.groups))
        for name, (squares, zeros, bad, count), most in zip(names, sums, largest, strict=True):
            # NaN is lost in a maximum over ranks.
            most = torch.where(bad > 0, torch.nan, most)
            trainer.log({f"{name}/norm": squares.sqrt(), f"{name}/rms": (squares / count).sqrt(), f"{name}/max": most,
                         f"{name}/zeros": zeros / count, f"{name}/nonfinite": bad / count})

    def _totals(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The sums [groups, 4] and the largest magnitudes [groups] over all ranks."""
        by_layout: dict[tuple[dist.ProcessGroup, ...], tuple[Tensor, Tensor]] = {}
        size = len(self._cell.groups) + 1
        for parameter, shards, members in self._parameters:
            if not self._of_gradients:
                piece = local(parameter)
            elif (gradient := parameter.grad) is not None:
                piece = local_gradient(parameter, gradient)
            else:
                continue
            sums, largest = by_layout.setdefault(shards.groups, (
                torch.zeros(size, _SUMS, dtype=torch.float64, device=device), torch.zeros(size, device=device)))
            sums[members] += _sums(piece)
            if piece.numel():
                largest[members] = torch.maximum(largest[members], torch.stack(piece.aminmax()).float().abs().amax())
        total, most = torch.zeros(size, _SUMS, dtype=torch.float64, device=device), torch.zeros(size, device=device)
        for groups, (sums, largest) in by_layout.items():
            for group in groups:
                dist.all_reduce(sums, group=group)
                dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            total, most = total + sums, torch.maximum(most, largest)
        if self._stages is not None:
            dist.all_reduce(total, group=self._stages)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self._stages)
        return total, most


def _sums(piece: Tensor) -> Tensor:
    """Of one piece: squares, zeros, what is not finite, elements [4]."""
    squares = torch.linalg.vector_norm(piece, dtype=torch.float32).double().square()
    count = torch.full_like(squares, piece.numel())
    # 0 where an element is finite, else NaN, which counts: on a CPU a third of the time of `isfinite`.
    bad = torch.count_nonzero(piece - piece).double()
    return torch.stack([squares, count - torch.count_nonzero(piece), bad, count])
