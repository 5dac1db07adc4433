"""What the arms of a comparison came to: the face that tables, figures, fairness, exports and reports work on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from collie_lab.folder import Tail
from collie_lab.launch import Run

if TYPE_CHECKING:
    import pandas as pd

    from collie_lab.study.columns import Column

__all__ = ["FINISHED", "SEED", "UNDER_WAY", "Outcomes", "arm_frame", "attempts", "run_figures", "seedless",
           "tuned_axes", "whole_metrics"]

#: Statuses whose figures count. Every other one stands in a table as a word.
FINISHED: Final = ("ok", "stopped")
#: Statuses of what has not come to its end.
UNDER_WAY: Final = ("pending", "starting", "running")
#: The axis over whose values figures are averaged.
SEED: Final = "seed"


class Outcomes(Protocol):
    """Arms, what distinguishes them, and what they came to. `lab.Study` and `lab.Results` are such."""

    @property
    def frame(self) -> pd.DataFrame:
        """A row an arm, by its name, in base units (bytes, seconds, tokens, shares of one).

        Columns: one an axis (or the index itself, where it bears an axis' name), `status`, and figures by their key.
        Where there are such: `seed`, `id`, `reason`, `run`; `planned_bytes`, and what they are made of:
        `planned_weights`, `planned_optimizer`, ...
        """

    @property
    def axes(self) -> Sequence[str]:
        """The axes that the arms lie on; `seed` may be one."""

    @property
    def runs(self) -> Mapping[str, Run]:
        """The run of each arm that has one, by the arm's name."""


def attempts(run: Run) -> list[tuple[Run, float]]:
    """A run and those in the same folder that it went on from, the oldest first; each with the last of its steps that
    count, for those after it were made again."""
    found = [(run, math.inf)]
    while resumed := _resumed(found[0][0]):
        checkpoint = Path(resumed)
        step = checkpoint.name.removeprefix("step-")  # <run>/checkpoints/step-N
        earlier = run.folder.path.parent / checkpoint.parents[1].name  # both may have been moved, or copied
        if not step.isdecimal() or not (earlier / "launch.json").is_file() or any(
                earlier == each.folder.path for each, _ in found):
            break
        found.insert(0, (Run(earlier), float(step)))
    return found


def _resumed(run: Run) -> str | None:
    """The checkpoint that a run was launched from. (Begun again by itself, it goes on from one of its own.)"""
    launch = run.folder.read("launch.json")
    resumed: str | None = launch.get("launched_from", launch.get("resume_from"))
    return resumed


def whole_metrics(run: Run) -> pd.DataFrame:
    """`run.metrics` over all attempts; of a step that was made again, the later account."""
    import pandas as pd

    parts = [each.metrics for each, _ in attempts(run)]
    kept = [part[part["step"] <= until] for part, (_, until) in zip(parts, attempts(run), strict=True)]
    return pd.concat(kept).drop_duplicates("step", keep="last").sort_values("step")


def run_figures(run: Run) -> dict[str, Any]:
    """What a run adds to its row of `Outcomes.frame`: its summary, and, over all attempts,

    - `tgs`: useful (non-padding) tokens per rank and second;
    - `mfu`: the mean over its steps, the first two left out; NaN where the peak of the hardware is not known;
    - `tokens_per_step`: useful tokens of a step over all ranks, the mean of its steps;

    and `parameters` also of one that has failed, as its start told them.
    """
    metrics = whole_metrics(run)
    summary, speed, missing = run.summary, run.summary.get("tokens_per_second"), float("nan")
    events = Tail(run.folder.path / "events.jsonl").new()
    told = [event["parameters"] for event in events if event["kind"] == "start" and "parameters" in event]
    return {
        **({"parameters": told[-1]} if told else {}),
        **summary,
        "tgs": missing if speed is None else speed / summary.get("world_size", 1),
        "mfu": float(metrics["mfu"].iloc[2:].astype(float).mean()),
        "tokens_per_step": float(metrics["tokens"].mean()),
    }


def tuned_axes(outcomes: Outcomes) -> Mapping[str, str | Column]:
    """The axes whose values were tried to choose the best, each with the metric that chooses: `tuned` of the outcomes,
    where they have it. Their arms are in the frame, whatever their value."""
    return getattr(outcomes, "tuned", None) or {}


def arm_frame(outcomes: Outcomes) -> pd.DataFrame:
    """The frame with every axis as a column, and labels that can be compared: `None` where an arm lacks one."""
    frame = outcomes.frame
    plain = frame.copy()
    for axis in outcomes.axes:
        values = frame.index if axis == frame.index.name and axis not in frame else frame[axis]
        plain[axis] = [_label(value) for value in values]
        plain[axis] = plain[axis].astype(object).where(plain[axis].notna(), None)
    return plain.rename_axis(None)


def _label(value: Any) -> Any:
    """A whole cell as a value of an axis is a mapping, which no key can be: its text."""
    if isinstance(value, (Mapping, list, tuple)):
        return json.dumps(value, sort_keys=True, default=str)
    return None if value is None or value != value else value


def seedless(axes: Sequence[str]) -> list[str]:
    """The axes that distinguish what is compared."""
    return [axis for axis in axes if axis != SEED]
