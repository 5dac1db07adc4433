"""The parallel cell: how many processes, and what each of them holds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from collie_lab.cells._base import Cell

__all__ = ["Parallel"]


class Parallel(Cell):
    """The layout of a run over its ranks.

    `zero=0` replicates the model on every data-parallel rank; `zero=2` shards gradients and optimizer
    state, `zero=3` the weights too (FSDP2; ZeRO stages after Rajbhandari et al., arXiv 1910.02054).
    """

    dp: int = Field(default=1, ge=1)
    """Data-parallel ranks."""
    zero: Literal[0, 2, 3] = 0

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp
