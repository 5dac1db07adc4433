"""What the plans of all runs in a folder were worth: planned against measured, by component."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_lab.launch import Run, runs
from collie_lab.planning._client import PlanError
from collie_lab.planning.kept import COMPONENTS
from collie_lab.view.units import NOTHING, bytes_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Residuals", "residuals"]

#: Runs that ended otherwise have not measured a whole step, or not what was planned.
_MEASURED = ("ok", "stopped", "diverged")


@dataclass(frozen=True)
class Residuals:
    """Runs and the errors of their plans; the last line of a notebook's cell shows a table and a picture.

    Attributes:
        frame: a row a run: `model`, `gpu` (None: a CPU), `planned` and `measured` peak in bytes and its `error` (a
            share of the measured peak); for each of `weights`, `gradients`, `optimizer`, `rest` the same three with
            the component's name before them; `reason`, where one of the two is missing.
    """

    frame: pd.DataFrame

    def figure(self) -> Figure:
        """Planned against measured peaks, and the errors by component, run by run."""
        from collie_lab.planning._residual_figure import draw

        return draw(self.frame)

    def __repr__(self) -> str:
        if self.frame.empty:
            return "no runs"
        errors = self.frame["error"].abs().dropna()
        if errors.empty:
            return f"{len(self.frame)} runs, none of them planned and measured"
        missing = len(self.frame) - len(errors)
        rest = f"; {missing} without a plan or a measurement" if missing else ""
        return (f"peak memory of {len(errors)} run{'s' * (len(errors) > 1)}: median error "
                f"{100 * errors.median():.3f}%, worst {100 * errors.max():.3f}% ({errors.idxmax()}){rest}")

    def table(self) -> pd.DataFrame:
        """The frame as one reads it."""
        import pandas as pd

        parts = COMPONENTS[:-1]
        rows = [{"model": row["model"], "on": "CPU" if pd.isna(row["gpu"]) else row["gpu"],
                 "planned": bytes_text(row["planned"]), "measured": bytes_text(row["measured"]),
                 "error": _share(row["error"]), **{name: _share(row[f"{name}_error"]) for name in parts},
                 "": row["reason"]}
                for row in self.frame.to_dict("records")]
        columns = ["model", "on", "planned", "measured", "error", *parts, ""]
        return pd.DataFrame(rows, index=self.frame.index, columns=columns)

    def _repr_html_(self) -> str:
        if self.frame.empty or self.frame["error"].isna().all():
            picture = ""
        else:
            import base64

            from collie_lab.view.figures import png

            data = base64.b64encode(png(self.figure())).decode()
            picture = f"<img alt='planned against measured' src='data:image/png;base64,{data}'>"
        return f"<p>{html.escape(repr(self))}</p>{self.table().to_html() if len(self.frame) else ''}{picture}"


def residuals(folder: str | Path = "runs") -> Residuals:
    """Every run in a folder with its plan, what it measured, and the error of the one against the other.

    Runs that have ended and hold no plan yet are planned now, which takes a few seconds each.
    """
    import pandas as pd

    found = runs(folder)
    missing = [run for run in found if not run.alive and run.status in _MEASURED
               and not run.folder.read("plan.json")]
    for index, run in enumerate(missing, 1):
        print(f"planning {run.id}, which holds no plan yet ({index} of {len(missing)})", flush=True)
        _planned(run)
    rows = {run.id: _row(run) for run in found}
    columns = ["model", "gpu", "planned", "measured", "error", *(
        f"{name}_{what}" for name in COMPONENTS[:-1] for what in ("planned", "measured", "error")), "reason"]
    return Residuals(pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("run"))


def _planned(run: Run) -> str:
    """Make sure that a run holds a plan; why it holds none, if so."""
    try:
        run.plan  # noqa: B018
    except PlanError as error:
        return str(error)
    return ""


def _row(run: Run) -> dict[str, Any]:
    import yaml

    row: dict[str, Any] = {"model": yaml.safe_load(run.experiment_yaml)["model"]["source"]}
    if run.status not in _MEASURED:
        return {**row, "reason": run.status.replace("_", " ")}
    if reason := _planned(run):
        return {**row, "measured": run.summary["peak_bytes"] or math.nan, "reason": reason}
    frame, plan = run.residual, run.plan
    row |= {"gpu": plan.gpu.name if plan.gpu else None, "reason": ""}
    for name in COMPONENTS:
        for what in ("planned", "measured", "error"):
            row[what if name == "total" else f"{name}_{what}"] = frame.loc[name, what]
    if math.isnan(row["measured"]):
        row["reason"] = "its peak was not measured"
    return row


def _share(error: float) -> str:
    """Of the measured peak, in percent."""
    if error is None or math.isnan(error):
        return NOTHING
    return f"{100 * error:+.3f}%" if round(error, 5) else "0"
