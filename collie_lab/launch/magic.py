"""`%%ranks`: a cell of the notebook on every rank of a pool. `%load_ext collie_lab` brings it."""

from __future__ import annotations

from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from collie_lab.cells import CellError
from collie_lab.launch.pool import Pool, latest

__all__ = ["register"]


def register(shell: Any) -> None:
    """Give an IPython shell the magic."""
    shell.register_magics(_RanksMagics)


@magics_class
class _RanksMagics(Magics):  # type: ignore[misc]
    def __init__(self, shell: Any):
        super().__init__(shell)
        self._own: Pool | None = None

    @magic_arguments()  # type: ignore[untyped-decorator]
    @argument("-n", "--nproc", type=int, help="start so many ranks, where there is no pool of that size")  # type: ignore[untyped-decorator]
    @cell_magic  # type: ignore[untyped-decorator]
    def ranks(self, line: str, cell: str) -> None:
        """Execute the cell on every rank of the latest `lab.Pool`, or of one that `-n` makes."""
        self._pool(parse_argstring(self.ranks, line).nproc).run(cell)

    def _pool(self, nproc: int | None) -> Pool:
        try:
            pool = latest()
        except CellError:
            if nproc is None:
                raise UsageError("there are no ranks yet: `%%ranks -n 2` starts two") from None
        else:
            if nproc in (None, pool.nproc):
                return pool
            if self._own is not None:
                self._own.close()
        assert nproc is not None
        self._own = Pool(nproc)
        return self._own
