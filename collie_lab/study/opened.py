"""An arm from within its notebook: what it is, its forecast, its launch, what came out."""

from __future__ import annotations

import ast
import html
import importlib
import itertools
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_lab.cells import CellError, Experiment, Problem
from collie_lab.gpus import on_machine
from collie_lab.launch import Run, launch
from collie_lab.study.arms import Arm, read_arm
from collie_lab.study.forecast import Forecast, device_of
from collie_lab.study.store import ArmFolder
from collie_lab.view.units import bytes_text, number_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["OpenArm", "check_parameters", "open_arm"]

_INJECTED = "# Parameters"


def open_arm(place: str | Path) -> OpenArm:
    """The arm of a folder or of an experiment's YAML file, for a notebook.

    Raises:
        CellError: neither of both.
    """
    if not str(place):
        raise CellError([Problem("arm", "", "no arm is named", "arm = a folder in a study's results, or an "
                                 "experiment's YAML file")])
    return OpenArm(read_arm(place), Path(place))


class OpenArm:
    """One arm, about to run in this kernel."""

    def __init__(self, arm: Arm, place: Path):
        self.arm, self._place = arm, place

    @property
    def experiment(self) -> Experiment:
        """What is run."""
        return self.arm.experiment

    @property
    def forecast(self) -> Any:
        """What the study's forecast for this machine says of the arm."""
        planned = self._planned_bytes({})
        gpu = on_machine({})
        return _Words(f"peak {bytes_text(planned)} a rank" if planned else "no forecast was made for this machine: "
                      f"study.forecast({'' if gpu is None else repr(gpu.name)})")

    def launch(self, resume: str | None = None) -> Run:
        """Run it, into `runs/` of the arm's folder, or of the working directory where there is none.

        No plan is made beside it: that would take time from what is measured. The study's forecast is its plan.
        """
        parent = ArmFolder(self._place).runs if self._place.is_dir() else "runs"
        threading.Thread(target=_load_what_draws, daemon=True).start()
        return launch(self.experiment, folder=parent, resume=resume, timeout=self.arm.timeout, plan=False,
                      _module=self.arm.module)

    def outcome(self, run: Run) -> pd.Series[Any]:
        """The run's summary, with the forecast beside."""
        summary = run.summary
        if planned := self._planned_bytes(run.folder.read("env.json")):
            summary["planned_bytes"] = planned
        return summary

    def _planned_bytes(self, env: Mapping[str, Any]) -> int | None:
        """What was planned for the device of an `env.json`; of an empty one, for this machine's."""
        plans = Forecast(self._place.resolve().parent.parent).planned.get(self.arm.id, {})
        return plans.get(device_of(env), {}).get("bytes")

    def __repr__(self) -> str:
        labels = ", ".join(f"{axis}: {label}" for axis, label in self.arm.labels.items())
        return f"{self.arm.name} (arm {self.arm.id})" + (f": {labels}, seed: {self.arm.seed}" if labels else "")

    def _repr_html_(self) -> str:
        rows = {"arm": self.arm.name, **self.arm.labels, "seed": self.arm.seed, "runner": self.arm.runner,
                "id": self.arm.id}
        return "<table>" + "".join(
            f"<tr><td style='text-align:left;opacity:.65'>{html.escape(str(name))}</td>"
            f"<td style='text-align:left'>{html.escape(_shown(value))}</td></tr>" for name, value in rows.items()
        ) + "</table>"


def _load_what_draws() -> None:
    """A second's worth of imports that the end of a run wants, while its ranks load theirs."""
    importlib.import_module("pandas")
    importlib.import_module("matplotlib.pyplot")


class _Words(str):
    """A sentence that a notebook shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


def check_parameters() -> None:
    """Raise where papermill was given a parameter that this notebook does not have. (Papermill itself only warns.)

    Raises:
        CellError: unknown parameters, and those that there are.
    """
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    sources = [] if shell is None else [str(source) for source in shell.user_ns.get("In", [])]
    for defaults, injected in itertools.pairwise(sources):
        if injected.startswith(_INJECTED):
            known = _assigned(defaults)
            if unknown := sorted(_assigned(injected) - known):
                raise CellError([Problem("notebook", name, "unknown parameter", "its parameters: "
                                         + ", ".join(sorted(known))) for name in unknown])


def _assigned(source: str) -> set[str]:
    """The names that a cell assigns."""
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Store)}


def _shown(value: Any) -> str:
    return number_text(value) if isinstance(value, float) else str(value)
