"""How AdaLomo's kernels cut matrices into blocks, and what they note of them between their passes. Needs no Triton."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ACROSS", "COLUMNS", "DEEP", "DOWN", "LONG", "ROWS", "STEP", "WIDE", "Counts", "scratch_sizes"]

_Sizes = NDArray[np.int64]

# A block of the first pass belongs to one warp, which takes some of its rows at a time: it adds up the columns in its
# registers and the rows by shuffles, and waits for nobody. (Warps that share a block reach a third of the bandwidth.)
DOWN: Final = 128
ACROSS: Final = 256
STEP: Final = 4
# A tile of the second pass.
ROWS: Final = 16
COLUMNS: Final = 256
# A tile of the sums over blocks.
DEEP: Final = 32
WIDE: Final = 128
# A piece of a vector.
LONG: Final = 4096


class Counts(NamedTuple):
    """How many pieces of each pass matrices of m rows and n columns have."""

    down: _Sizes
    across: _Sizes
    tiles: _Sizes
    row_chunks: _Sizes
    column_chunks: _Sizes

    @classmethod
    def of(cls, m: _Sizes, n: _Sizes) -> Counts:
        """From the matrices' sizes."""
        return cls(-(-m // DOWN), -(-n // ACROSS), -(-m // ROWS), -(-m // WIDE), -(-n // WIDE))


def scratch_sizes(m: _Sizes, n: _Sizes) -> dict[str, _Sizes]:
    """How many fp32 numbers the arrays between the passes have, a name an array, for matrices of m rows and n columns.

    Multiples of four: 16 bytes, to which addresses are aligned.
    """
    count = Counts.of(m, n)
    sizes = {"row_sums": count.across * m, "column_sums": count.down * n, "squares": count.down * count.across,
             "means": count.column_chunks, "energies": count.tiles, "row": m, "column": n, "numbers": np.ones_like(m)}
    return {name: -(-size // 4) * 4 for name, size in sizes.items()}
