"""From experiments to studies: grids of arms, their runs, tables and figures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collie_lab.study.arms import Arm
    from collie_lab.study.materials import clinc_splits, find_shared
    from collie_lab.study.opened import check_parameters, open_arm
    from collie_lab.study.ray import Ray
    from collie_lab.study.results import Results
    from collie_lab.study.slurm import Slurm
    from collie_lab.study.study import Study

__all__ = ["Arm", "Ray", "Results", "Slurm", "Study", "check_parameters", "clinc_splits", "find_shared", "open_arm"]

_PLACES = {
    "Arm": "arms", "Ray": "ray", "Results": "results", "Slurm": "slurm", "Study": "study",
    "check_parameters": "opened", "clinc_splits": "materials", "find_shared": "materials", "open_arm": "opened",
}


def __getattr__(name: str) -> Any:
    """Imported when first used: the process of an arm needs no tables, and a table no grid."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"collie_lab.study.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
