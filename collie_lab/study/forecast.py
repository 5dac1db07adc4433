"""What the arms of a study will need, before they run, and corrected by those that have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from collie_lab.cells import CellError, Experiment
from collie_lab.data.progress import Progress
from collie_lab.folder import read_json, write_json
from collie_lab.gpus import find_gpu, gpu_of_device
from collie_lab.machine import gpu_model
from collie_lab.planning import PlanError
from collie_lab.planning._client import AT_ONCE
from collie_lab.study.arms import Arm
from collie_lab.study.store import FINAL, ArmFolder

if TYPE_CHECKING:
    import pandas as pd

    from collie_lab.launch import Run

__all__ = ["Forecast", "device_of", "planned_columns", "ran_on"]


#: Under which the plans for a CPU are kept.
_CPU: Final = "cpu"


class Forecast:
    """The plans of a study's arms, kept in `forecast.json` of its results by the id of the arm and the GPU."""

    def __init__(self, results: Path):
        self._results = results

    @property
    def planned(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What was planned: `bytes`, `components`, `fits`, `tokens_per_second`, `seconds` of all steps,
        `gpu`, `note`, by the id of an arm and what it was planned for: a GPU's name, or `cpu`."""
        kept = read_json(self._results / "forecast.json")
        # Files of earlier versions have one plan an arm.
        return {id: {each["gpu"] or _CPU: each} if "bytes" in each else each for id, each in kept.items()}

    def beside(self, devices: Mapping[str, str | None]) -> dict[str, dict[str, Any]]:
        """The plan to be shown of each arm, by its id: for the device that it ran on, or none. Of an arm that has not
        run (None) the last that was made, for a device that others ran on where there are such."""
        planned, ran = self.planned, {device for device in devices.values() if device is not None}
        found: dict[str, dict[str, Any]] = {}
        for id, device in devices.items():
            own = [plan for place, plan in planned.get(id, {}).items()
                   if place == device or (device is None and (place in ran or not ran))]
            found[id] = own[-1] if own else {}
        return found

    def make(self, arms: Sequence[Arm], gpu: str | None,
             outcome: Callable[[Arm], tuple[str, Mapping[str, Any]]]) -> pd.DataFrame:
        """Plan what is not planned for this GPU yet, and put it into a table, a row an arm; see `Study.forecast`."""
        import pandas as pd

        gpu = None if gpu is None else find_gpu(gpu).name  # one that is none is a mistake, and no note of every arm's
        planned = self._plan(arms, gpu)
        rows, measured = {}, {}
        for arm in arms:
            plan = planned[arm.id][gpu or _CPU]
            measured[arm.name] = _measured(self._results, arm)
            rows[arm.name] = {
                "status": outcome(arm)[0], "planned_bytes": plan["bytes"], "fits": plan["fits"],
                "tokens_per_second": plan["tokens_per_second"], "seconds": plan["seconds"],
                "measured_seconds": measured[arm.name]["seconds"], "note": plan["note"]}
        frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")
        frame["seconds"] = _corrected(frame["seconds"].astype(float), pd.DataFrame.from_dict(measured, orient="index"),
                                      gpu)
        frame["gpu_hours"] = frame["seconds"] / 3600 * [arm.gpus for arm in arms]
        open_ = ~frame["status"].isin(FINAL)
        frame["remaining"] = frame["seconds"].where(open_, 0.0)
        return frame

    def _plan(self, arms: Sequence[Arm], gpu: str | None) -> dict[str, dict[str, dict[str, Any]]]:
        """What is planned, these arms with the rest. Those that are alike are planned once, several at once, and kept
        as they come: an interrupt loses none."""
        planned, alike = self.planned, defaultdict[str, list[Arm]](list)
        for arm in (arm for arm in arms if (gpu or _CPU) not in planned.get(arm.id, {})):
            alike[repr(_without_luck(arm.experiment))].append(arm)
        self._results.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(AT_ONCE) as pool, Progress("forecast", lambda: len(alike), "plans") as progress:
            made = {pool.submit(_plan, each[0].experiment, gpu): each for each in alike.values()}
            try:
                for future in as_completed(made):
                    for arm in made[future]:
                        planned.setdefault(arm.id, {})[gpu or _CPU] = future.result()
                    write_json(self._results / "forecast.json", planned)
                    progress.advance(1)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return planned


def device_of(env: Mapping[str, Any]) -> str:
    """What plans for the device of a run's `env.json` are kept under; of an empty one, for this machine's."""
    name = env.get("gpu") if env else gpu_model()
    if not name:
        return _CPU
    known = gpu_of_device(str(name))
    return str(name) if known is None else known.name


def ran_on(run: Run | None) -> str | None:
    """What plans for the device that a run was made on are kept under; None: there is none yet."""
    env = {} if run is None else run.folder.read("env.json")
    return device_of(env) if env else None


def planned_columns(plan: Mapping[str, Any]) -> dict[str, float | None]:
    """A plan's memory as columns of a frame: `planned_bytes`, and its parts: `planned_weights`, ..."""
    parts = plan.get("components") or {}
    return {"planned_bytes": plan.get("bytes"), **{f"planned_{role}": size for role, size in parts.items()}}


def _without_luck(experiment: Experiment) -> Experiment:
    """The experiment without what no plan depends on: the seed, and the learning rate, which tuning varies."""
    return experiment.replace(name="plan", training=experiment.training.replace(seed=0),
                              optimizer=experiment.optimizer.replace(lr=1e-3))


def _plan(experiment: Experiment, gpu: str | None) -> dict[str, Any]:
    none = {"gpu": gpu, "bytes": None, "fits": None, "tokens_per_second": None, "seconds": None, "note": ""}
    try:
        plan = experiment.plan(gpu)
    except (CellError, PlanError) as error:
        return {**none, "note": str(error).strip().splitlines()[0]}
    parts = {role: size for role, size in plan.worst["components"].items() if size}
    speed: float | None = getattr(plan, "tokens_per_second", None)
    tokens = experiment.training.steps * experiment.training.batch_size * plan.length
    return {**none, "components": parts, "bytes": plan.peak_bytes, "fits": plan.fits, "tokens_per_second": speed,
            "seconds": tokens / speed if speed else None}


def _measured(results: Path, arm: Arm) -> dict[str, Any]:
    """Of an arm that has come to its end: the `seconds` that it took, all attempts together, those of them in which it
    was `training`, and the `device` that it ran on."""
    folder = ArmFolder.find(results, arm.id)
    state: dict[str, Any] = folder.state if folder is not None else {"status": "pending"}
    if folder is None or state["status"] != "ok":
        return {"seconds": None, "training": None, "device": None}
    run = folder.run
    return {"seconds": float(state["seconds"] + state.get("seconds_before", 0.0)),
            "training": None if run is None else run.result.get("seconds"), "device": ran_on(run)}


def _corrected(planned: pd.Series[float], measured: pd.DataFrame, gpu: str | None) -> pd.Series[float]:
    """Planned seconds times what training took in truth over what was planned for it, and what arms took beside
    training: medians over those that ran on this device, for another says nothing of it. Where nothing is planned, the
    median of what those took; without a GPU, on whatever they ran. What was measured stays."""
    taken, training = measured["seconds"].astype(float), measured["training"].astype(float)
    here = measured["device"] == (gpu or _CPU)
    ratio, beside = (training / planned)[here].median(), (taken - training)[here].median()
    expected = planned * (1.0 if ratio != ratio else ratio) + (0.0 if beside != beside else beside)
    return taken.fillna(expected).fillna((taken if gpu is None else taken[here]).median())
