"""Starts experiments beside the kernel and holds on to them: kernel → supervisor → torchrun → ranks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collie_lab.launch._start import launch
    from collie_lab.launch.errors import RankError
    from collie_lab.launch.pool import Pool, pull
    from collie_lab.launch.run import Run, attach, runs

__all__ = ["Pool", "RankError", "Run", "attach", "launch", "pull", "runs"]

_PLACES = {"Pool": "pool", "RankError": "errors", "Run": "run", "attach": "run", "launch": "_start", "pull": "pool",
           "runs": "run"}


def __getattr__(name: str) -> Any:
    """Imported when first used: who only reads run folders needs nothing of what prepares one."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"collie_lab.launch.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
