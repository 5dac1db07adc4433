"""The plan that a run keeps: made beside it, written to `plan.json`, and held against what the run measured."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import yaml

from collie_lab.cells import CellError, Experiment, RandomTokens
from collie_lab.folder import RunFolder
from collie_lab.gpus import GPU, on_machine
from collie_lab.planning._client import PlanError, rest
from collie_lab.planning.plan import Plan, plan

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COMPONENTS", "keep", "kept_plan", "residual"]

_FILE: Final = "plan.json"
_IDLE: Final = 60.0  # seconds after which the process of the plans gives its memory back

#: The rows of a residual. `rest`: what comes and goes, at the peak beyond what is held when the update begins.
COMPONENTS: Final = ("weights", "gradients", "optimizer", "rest", "total")

_waiting: queue.Queue[tuple[Experiment, RunFolder]] = queue.Queue()
_keeper: threading.Thread | None = None


def keep(experiment: Experiment, folder: RunFolder) -> None:
    """Have a run's plan made and written to its folder when there is time for it; returns at once.

    `COLLIE_LAB_PLANS=off` in the environment: not.
    """
    global _keeper
    if os.environ.get("COLLIE_LAB_PLANS") == "off":
        return
    _waiting.put((experiment, folder))
    if _keeper is None:
        _keeper = threading.Thread(target=_keep_all, name="plans of runs", daemon=True)
        _keeper.start()


def kept_plan(folder: RunFolder) -> Plan:
    """The plan of a run; made now, and kept, where there is none yet.

    Raises:
        PlanError: the run cannot be planned, for this reason.
    """
    stored = folder.read(_FILE)
    if not stored:
        stored = _keep(_readable(folder), folder, quiet=False)
    if "reason" in stored:
        raise PlanError(stored["reason"])
    gpu = None if stored["gpu"] is None else GPU(**stored["gpu"])
    return Plan(_readable(folder, stored["length"]), gpu, stored["length"], tuple(stored["summaries"]))


def residual(found: Plan, result: Mapping[str, Any]) -> pd.DataFrame:
    """Planned and measured bytes of the worst rank, and the error as a share of the measured peak: a component may be
    nothing at all.

    Rows are `COMPONENTS`; what a run did not measure is NaN. `result`: that of `result.json`.
    """
    import pandas as pd

    held = COMPONENTS[:3]
    planned = _with_rest(found.peak_bytes, [found.worst["held"][name] for name in held])
    measured = _with_rest(result.get("peak_bytes"), [result.get(f"{name}_bytes") for name in held])
    rows = [(ours, theirs, (ours - theirs) / measured[-1]) for ours, theirs in zip(planned, measured, strict=True)]
    return pd.DataFrame(rows, index=pd.Index(COMPONENTS, name="component"), columns=["planned", "measured", "error"])


def _with_rest(total: float | None, held: Sequence[float | None]) -> list[float]:
    """Bytes in the order of `COMPONENTS`; NaN for what is not known."""
    known = [math.nan if value is None else float(value) for value in (*held, total)]
    return [*known[:-1], known[-1] - sum(known[:-1]), known[-1]]


def _keep_all() -> None:
    """The thread's work. It outlives its jobs: the process of the dry runs belongs to it."""
    while True:
        try:
            experiment, folder = _waiting.get(timeout=_IDLE)
        except queue.Empty:
            rest(quiet=True)
            experiment, folder = _waiting.get()
        with contextlib.suppress(OSError):  # the folder may be gone
            _keep(experiment, folder, quiet=True)


def _keep(experiment: Experiment, folder: RunFolder, quiet: bool) -> dict[str, Any]:
    try:
        found = plan(experiment, on_machine(folder.read("env.json")), quiet=quiet)
        stored: dict[str, Any] = {
            "gpu": dataclasses.asdict(found.gpu) if found.gpu else None, "length": found.length,
            "peak_bytes": found.peak_bytes, "summaries": list(found.summaries)}
    except Exception as error:  # whatever it is, the run goes on
        known = isinstance(error, (CellError, PlanError))
        stored = {"reason": str(error) if known else f"{type(error).__name__}: {error}"}
    folder.write(_FILE, stored)
    return stored


def _readable(folder: RunFolder, length: int | None = None) -> Experiment:
    """The experiment of a run as far as its YAML tells: code of a notebook is not loaded from a folder.

    What of its data and loss is code may be left out where the plan, and so the `length`, is known.
    """
    text = (folder.path / "experiment.yaml").read_text(encoding="utf-8")
    mapping = {key: value for key, value in yaml.safe_load(text).items() if key not in ("evaluate", "callbacks")}
    try:
        return Experiment.from_dict(mapping)
    except CellError as error:
        if length is None:
            raise PlanError(f"the experiment cannot be read from {folder.path}: {error}") from None
    tokens = RandomTokens(length=length, packing=bool(mapping["data"].get("packing")))
    return Experiment.from_dict({**mapping, "data": tokens, "training": {**mapping["training"], "loss": None}})
