"""What leaves a study as a file, each with a sidecar that says which arms it was made of."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from collie_lab._version import __version__
from collie_lab.folder import write_json
from collie_lab.study.conditions import ASPECTS, Conditions
from collie_lab.study.outcomes import SEED, Outcomes
from collie_lab.view.style import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "origins", "plain", "save_figure", "sidecar", "write_sidecar"]

#: In which a figure is written: for LaTeX, for the web and editing, for slides.
FORMATS: Final = ("pdf", "svg", "png")


def sidecar(outcomes: Outcomes, names: Iterable[str] | None = None) -> dict[str, Any]:
    """The arms of an artefact: of each its name, id, labels, seed, status, reason, run, commit and machine."""
    frame, runs = outcomes.frame, outcomes.runs
    wanted = set(frame.index if names is None else names)
    chosen = [name for name in frame.index if name in wanted]
    return {"made": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "collie_lab": __version__,
            "axes": list(outcomes.axes), "arms": [_arm(outcomes, frame.loc[name], name, runs) for name in chosen]}


def _arm(outcomes: Outcomes, row: Any, name: str, runs: Any) -> dict[str, Any]:
    known = {key: plain(row[key]) for key in ("id", SEED, "status", "reason") if key in row}
    labels = {axis: plain(row[axis]) for axis in outcomes.axes if axis in row and axis != SEED}
    told: dict[str, Any] = {"arm": name, **known, "labels": labels, "run": None}
    if name in runs:
        run = runs[name]
        environment = run.folder.read("env.json")
        told |= {"run": run.id, "git": environment.get("collie_lab_git"),
                 "data": run.folder.read("data/index.json").get("fingerprint"),
                 **{key: environment.get(key) for key in ("host", "platform", "gpu", "cores", "packages")}}
    return told


def plain(value: Any) -> Any:
    """A value of a frame as JSON has it."""
    value = value.item() if hasattr(value, "item") else value
    return None if value is None or value != value else value


def save_figure(figure: Figure, stem: str | Path, formats: Collection[str] = FORMATS) -> list[Path]:
    """Write a figure in these formats; the files.

    The same figure gives the same bytes: no dates are written.
    """
    stem = Path(stem).expanduser()
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{name}") for name in formats]
    dates: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    with style():
        for file in files:
            figure.savefig(file, dpi=200, bbox_inches="tight", metadata=dates[file.suffix[1:]])
    return files


def write_sidecar(stem: Path, arms: dict[str, Any]) -> Path:
    """`<stem>.json`: which arms an artefact was made of."""
    file = stem.with_name(f"{stem.name}.json")
    write_json(file, {"artefact": stem.name, **arms})
    return file


def origins(outcomes: Outcomes) -> dict[str, dict[str, list[str]]]:
    """Where the arms were measured: every commit, hardware, host and set of versions, and the arms of each."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, run in outcomes.runs.items():
        conditions = Conditions(run)
        for aspect in (each for each in ASPECTS if each.name in ("commit", "hardware", "ranks", "versions")):
            if (value := aspect.read(conditions)) is not None:
                found.setdefault(aspect.name, {}).setdefault(str(value), []).append(name)
        if host := conditions.environment.get("host"):
            found.setdefault("host", {}).setdefault(str(host), []).append(name)
    return found
