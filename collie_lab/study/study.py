"""A study: the arms of a grid, run, and their results in one table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_lab.cells import CellError, Problem
from collie_lab.cells._yaml import dump
from collie_lab.check import Report, check
from collie_lab.folder import write_json
from collie_lab.launch import Run
from collie_lab.provenance import code_version, provenance
from collie_lab.study.arms import Arm, arms_of
from collie_lab.study.cluster import Cluster
from collie_lab.study.columns import Column, column
from collie_lab.study.executor import Executor, make_executor
from collie_lab.study.forecast import Forecast, planned_columns, ran_on
from collie_lab.study.grid import Grid
from collie_lab.study.outcomes import SEED, run_figures
from collie_lab.study.presentation import Presentation
from collie_lab.study.progress import Progress
from collie_lab.study.runner import Runner
from collie_lab.study.store import ARM_STATUSES, FINAL, ArmFolder, summary_text
from collie_lab.study.tuning import Tuning, direction

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Study"]

class Study(Presentation):
    """The arms of a grid file.

        study = lab.Study("experiments/memory.yaml", profile="cpu")
        study.check(); study.forecast()
        study.run()          # what has no result yet, each arm in processes of its own
        study.frame          # a row an arm: labels, status, every figure

    Args:
        grid: a grid file; or a mapping of the same form.
        profile: one of its profiles, merged over the rest.
        results: the folder of the results. Default: `results/<name>-<profile>`.
        changes: of the grid's base, last: `{"data.source": "alpaca.json"}`.

    Raises:
        CellError: a mistake in the grid, before anything is written.
    """

    def __init__(self, grid: str | Path | Mapping[str, Any], profile: str | None = None,
                 results: str | Path | None = None, changes: Mapping[str, Any] | None = None):
        self.grid = Grid.read(grid, profile, changes)
        self.profile = profile
        name = self.grid.name if profile is None else f"{self.grid.name}-{profile}"
        self.results = Path(results if results is not None else Path("results") / name).expanduser()
        self._ends: dict[str, tuple[str, dict[str, Any]]] = {}  # of arms that have ended: status and summary
        self._folders: dict[str, ArmFolder] = {}
        self._made_now: dict[str, ArmFolder] = {}
        self._tuning = Tuning(self.grid.tune, arms_of(self.grid, self.results), self._outcome)
        if self.grid.tune is not None:
            for trials in self._tuning.choices().values():
                direction(trials.arms[0], self.grid.tune)

    def __repr__(self) -> str:
        return f"<Study {self.name}: {summary_text(self.statuses().values())}>"

    @property
    def name(self) -> str:
        """The study's name in its file."""
        return self.grid.name

    # --- what there is

    @property
    def arms(self) -> list[Arm]:
        """Every arm that is known now: with tuning, the other seeds of a method once its best value is."""
        return self._tuning.known()

    @property
    def axes(self) -> list[str]:
        """The axes of the grid, and `seed` where there are several. A grid without axes has one, `study`, with its name
        as the one label: so its table has a row, and its figures have something to show it by."""
        axes = dict.fromkeys(axis for arm in self.arms for axis in self._labels(arm))
        return [*axes, *([SEED] if len({arm.seed for arm in self.arms}) > 1 else [])]

    @property
    def tuned(self) -> dict[str, Column]:
        """The axis that is tuned, and the metric that chooses its value."""
        if self.grid.tune is None:
            return {}
        better = direction(self.arms[0], self.grid.tune)
        return {self.grid.tune.axis: replace(column(self.grid.tune.metric), better=better)}

    @property
    def title(self) -> str:
        """The name and the profile."""
        return self.name if self.profile is None else f"{self.name} ({self.profile})"

    @property
    def folders(self) -> dict[str, Path]:
        """The folder of each arm that has one, by the arm's name."""
        found = {arm.name: self._folder(arm) for arm in self.arms}
        return {name: folder.path for name, folder in found.items() if folder is not None}

    @property
    def recipe(self) -> dict[str, str]:
        """The grid with the profile in place, as a grid file."""
        fields = {key: value for key, value in self.grid.replace(profiles={}).to_dict().items()
                  if key != "kind" and value not in (None, {}, [])}
        if "tune" in fields:
            del fields["tune"]["kind"]
        return {"grid.yaml": dump(fields)}

    @property
    def runs(self) -> dict[str, Run]:
        """The newest run of each arm that has one, by the arm's name."""
        found = {arm.name: self._folder(arm) for arm in self.arms}
        return {name: run for name, folder in found.items() if folder is not None and (run := folder.run) is not None}

    def statuses(self) -> dict[str, str]:
        """The status of every arm by its name: one of `ARM_STATUSES`."""
        self._ends.clear()
        return {arm.name: self._outcome(arm)[0] for arm in self.arms}

    def reasons(self) -> dict[str, str]:
        """What is to be said of each arm that has run and is not ok, or has something to say."""
        states = {arm.name: folder.state for arm in self.arms if (folder := self._folder(arm)) is not None}
        return {name: state.get("reason", "") for name, state in states.items() if state.get("reason")}

    @property
    def frame(self) -> pd.DataFrame:
        """A row an arm, by its name: `id`, its labels, `seed`, `status` and `reason`, `attempts`, `run` (the folder),
        `runner`, `code` (the version of collie_lab), `arm_seconds` (of the last attempt, from the start of its process
        to its end), the figures of its run (see `run_figures`), and `planned_bytes`, the peak that the forecast said
        for the device that the arm ran on, with its parts: `planned_weights`, `planned_optimizer`, ...
        """
        import pandas as pd

        self._ends.clear()
        planned = Forecast(self.results).beside({
            arm.id: ran_on(folder.run if (folder := self._folder(arm)) is not None else None) for arm in self.arms})
        rows = {arm.name: {**self._row(arm), **planned_columns(planned[arm.id])} for arm in self.arms}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")

    # --- before anything runs

    def check(self) -> Report:
        """The conflicts in the arms that have no result yet; what several arms share stands there once."""
        self._ends.clear()
        found: dict[Problem, list[str]] = {}
        known: dict[str, list[Problem]] = {}  # of what arms share: records are read once
        for arm in self.arms:
            if self._outcome(arm)[0] in FINAL:
                continue
            for problem in [*check(arm.experiment, known).problems, *arm.refused]:
                found.setdefault(problem, []).append(arm.name)
        return Report([Problem(each.cell, each.field, f"{each.message} ({_named(names)})", each.remedy, each.level)
                       for each, names in found.items()])

    def forecast(self, gpu: str | None = None) -> pd.DataFrame:
        """What each arm will need, before it runs: `planned_bytes` of the worst rank, whether that `fits` on the GPU,
        `tokens_per_second`, `seconds`, `gpu_hours`; `remaining` seconds of those that have no result yet.

        Seconds are planned where the speed is (with a `gpu` of the catalogue), and else what arms that have ended took;
        they are corrected by what those on this GPU took in truth. What cannot be planned says so in `note`.
        """
        self._ends.clear()
        return Forecast(self.results).make(self.arms, gpu, self._outcome)

    # --- running

    def run(self, slots: int | None = None, executor: str | Cluster | Executor = "local", progress: bool = True,
            fresh_code: bool = False) -> pd.DataFrame:
        """Run every arm that has no result yet, each in processes of its own; the frame.

        What a killed or stopped arm has left is gone on with from its newest checkpoint. An arm that fails does not
        keep the others from running. An interrupt stops the arms under way after their step, with a checkpoint; a
        second one kills them.

        Args:
            slots: arms at once. Default: one; with GPUs as many as there is one for each rank.
            executor: where they run: `local`, this machine; `slurm` or `ray`, or a `Slurm` or `Ray` with settings.
            progress: show how far it is.
            fresh_code: run arms anew whose result comes from another version of collie_lab.

        Raises:
            CellError: an arm that cannot start; nothing has been started then.
        """
        self.check().raise_for_errors()
        chosen = make_executor(executor, slots)
        chosen.check(arm for arm in self.arms if self._outcome(arm)[0] not in FINAL)
        if fresh_code:
            self.retry(arms=self.outdated, resume=False)
        self._write()
        observer = Progress(self._tuning.count, self._seconds) if progress else None
        runner = Runner(self._tuning.known, self._made, chosen, observer)
        try:
            runner.run()
        finally:
            self._write()
            if observer is not None:
                observer.close()
        return self.frame

    @property
    def outdated(self) -> list[str]:
        """Arms with a result that another version of collie_lab has made."""
        now = code_version(provenance())
        return [arm.name for arm in self.arms if (folder := self._folder(arm)) is not None
                and (state := folder.state)["status"] in FINAL and code_version(state.get("provenance", {})) != now]

    def retry(self, status: str | Iterable[str] | None = None, arms: str | Iterable[str] | None = None,
              resume: bool = True) -> list[str]:
        """Have finished arms run again at the next `run`; their names. What they left is kept.

        Args:
            status: those with this status, or one of these.
            arms: those of these names.
            resume: go on from their newest checkpoint where they have one; else from the beginning.

        Raises:
            CellError: an unknown status or name, or neither of both.
        """
        if status is None and arms is None:
            raise CellError([Problem("study", "retry", "which arms?", "status='error', or arms=[...] by their names")])
        statuses = _several(status, ARM_STATUSES, "status")
        names = _several(arms, [arm.name for arm in self.arms], "arms")
        self._ends.clear()
        again = []
        for arm in self.arms:
            folder = self._folder(arm)
            if folder is None or (statuses is not None and folder.status not in statuses) \
                    or (names is not None and arm.name not in names):
                continue
            if folder.reset(resume):
                again.append(arm.name)
        self._ends.clear()
        return again

    def status(self) -> pd.Series[Any]:
        """How many arms there are of each status, and how many in all."""
        import pandas as pd

        counts = Counter(self.statuses().values())
        rows = {status: counts[status] for status in ARM_STATUSES if counts[status]}
        return pd.Series({**rows, "arms": self._tuning.count}, name=self.name, dtype=int)

    def export(self, out: str | Path, **options: Any) -> Path:
        """Everything a reviewer needs, in one folder or one .zip; see `collie_lab.study.export.export`."""
        from collie_lab.study.export import export

        return export(self, out, **options)

    # --- inside

    def _labels(self, arm: Arm) -> dict[str, Any]:
        return arm.labels or {"study": self.name}

    def _row(self, arm: Arm) -> dict[str, Any]:
        folder = self._folder(arm)
        state: dict[str, Any] = folder.state if folder is not None else {"status": "pending"}
        run = folder.run if folder is not None else None
        # What was stopped goes on: its figures are no result yet, and must not enter a mean, or win.
        figures = {} if run is None or state["status"] == "stopped" else run_figures(run)
        labels = self._labels(arm)
        return {
            "id": arm.id, **labels, SEED: arm.seed,
            "status": state["status"], "reason": state.get("reason", ""),
            "attempts": state.get("attempts", 0), "run": None if run is None else str(run.folder.path),
            "runner": labels.get("runner", arm.runner), "code": code_version(state.get("provenance", {})),
            "arm_seconds": state.get("seconds"),
            **{key: value for key, value in figures.items() if key not in ("status", "detail", *labels)},
        }

    def _outcome(self, arm: Arm) -> tuple[str, dict[str, Any]]:
        """Status and summary of an arm; of one that has ended they are read once."""
        if arm.id not in self._ends:
            folder = self._folder(arm)
            status = "pending" if folder is None else folder.status
            run = folder.run if folder is not None else None
            found = status, {} if run is None or status not in FINAL else dict(run.summary)
            if status not in FINAL:
                return found
            self._ends[arm.id] = found
        return self._ends[arm.id]

    def _seconds(self) -> list[float]:
        """How long the arms that have ended took."""
        return [float(self._folders[arm.id].state["seconds"]) for arm in self.arms if arm.id in self._ends]

    def _folder(self, arm: Arm) -> ArmFolder | None:
        if arm.id not in self._folders:
            found = ArmFolder.find(self.results, arm.id)
            if found is None:
                return None
            self._folders[arm.id] = found
        return self._folders[arm.id]

    def _made(self, arm: Arm) -> ArmFolder:
        if arm.id not in self._made_now:
            self._folders[arm.id] = self._made_now[arm.id] = ArmFolder.create(self.results, arm)
        return self._made_now[arm.id]

    def _write(self) -> None:
        """Write `study.json`: the resolved grid, which arms it has, and what tuning has found."""
        self.results.mkdir(parents=True, exist_ok=True)
        tuning = [{"group": list(group), "values": [arm.labels[self.grid.tune.axis] for arm in trials.arms],
                   "arms": [arm.id for arm in trials.arms], "figures": trials.figures,
                   "best": trials.best.id if trials.best is not None else None}
                  for group, trials in self._tuning.choices().items()] if self.grid.tune is not None else []
        write_json(self.results / "study.json", {
            "name": self.name, "profile": self.profile, "cwd": os.getcwd(), "axes": self.axes,
            "arms": {arm.id: arm.name for arm in self.arms}, "tuning": tuning,
            "grid": self.grid.replace(profiles={}).to_dict(),
        })


def _several(asked: str | Iterable[str] | None, known: Iterable[str], what: str) -> set[str] | None:
    if asked is None:
        return None
    wanted = {asked} if isinstance(asked, str) else set(asked)
    if unknown := sorted(wanted - set(known)):
        raise CellError([Problem("study", what, f"there is no {unknown[0]!r}", "there are: " + "; ".join(known))])
    return wanted


def _named(names: list[str]) -> str:
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")
