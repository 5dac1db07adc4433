"""What a pool's folder holds: commands for its ranks, numbered from 1, and how each ended on every rank.

    commands/000001.json   {"kind": "run", "folder": ...} | {"kind": "cell", "code": ...} | {"kind": "push"} |
                           {"kind": "pull", "name": ..., "ranks": [...]}
    cells/000001/          rank-N.{out,err}  rank-N.pkl (what was pulled)  values.pkl (what was pushed)
    done/000001/rank-N.json

The folder is the user's alone (mode 0700): its pickles are read by its own processes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collie_lab.folder import RunFolder, read_json, write_json

__all__ = ["Commands"]


class Commands:
    """Paths in a pool's folder."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def path(self, index: int) -> Path:
        """The command of this number."""
        return self.folder.path / "commands" / f"{index:06d}.json"

    def place(self, index: int) -> Path:
        """Where a cell's outputs and values are."""
        return self.folder.path / "cells" / f"{index:06d}"

    def done(self, index: int, rank: int) -> Path:
        """How a command ended on a rank."""
        return self.folder.path / "done" / f"{index:06d}" / f"rank-{rank}.json"

    def give(self, index: int, command: Mapping[str, Any]) -> None:
        """Have the ranks do something once they have done all before."""
        for folder in (self.path(index).parent, self.done(index, 0).parent):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path(index), dict(command))

    def outcomes(self, index: int, ranks: int) -> dict[int, dict[str, Any]]:
        """How a command has ended, of the ranks that have."""
        paths = {rank: self.done(index, rank) for rank in range(ranks)}
        return {rank: read_json(path) for rank, path in paths.items() if path.exists()}
