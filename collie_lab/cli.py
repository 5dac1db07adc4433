"""The verbs of a notebook for a shell: `collie-lab run exp.yaml`, with the same words and the same YAML.

Only typer is imported at the start; what a command needs, when it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from collie_lab.cells import CellError, Experiment, Model, Problem
from collie_lab.shell import MISTAKE, Group, parse_changes, terminated_as_interrupted
from collie_lab.study.commands import report, study_app

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from collie_lab.launch import Run

__all__ = ["app"]

_EXITS: Final = {"ok": 0, "error": 1, "lost": 1, "diverged": 3, "cuda_oom": 4, "host_oom": 5, "timeout": 124,
                 "stopped": 130}

app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(study_app, name="study")
app.command()(report)  # of a study, under the name that one looks for

_File = Annotated[Path, typer.Argument(metavar="EXP.yaml", help="An experiment, as `exp.to_yaml` writes it.")]
_Changes = Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, "
                                                    "optimizer.lr=3e-5, or a slot, 'optimizer={kind: lion, lr: 1e-4}'. "
                                                    "As often as wanted.")]
_Folder = Annotated[Path, typer.Option(help="The folder of the runs.")]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """A workbench for experiments in training large language models."""
    if version:
        from collie_lab import __version__

        print(__version__)


@app.command()
def run(file: _File, changes: _Changes = None, folder: _Folder = Path("runs"),
        resume: Annotated[str | None, typer.Option(help="A run (its id), or a checkpoint (its folder), to go on "
                                                        "from.")] = None,
        timeout: Annotated[float | None, typer.Option(help="End it after so many seconds.")] = None,
        max_restarts: Annotated[int, typer.Option(help="Begin again so often after failures.")] = 0,
        detach: Annotated[bool, typer.Option("--detach", help="Print the run's id and return; it goes on.")] = False,
        ) -> None:
    """Train. Ctrl-C, or SIGTERM, stops after the step with a checkpoint; twice kills.

    The exit code tells the status: 0 ok, 1 error or lost, 3 diverged, 4 out of GPU memory, 5 out of host memory,
    124 timeout, 130 stopped.
    """
    from collie_lab.launch import RankError

    experiment = _experiment(file, changes)
    try:
        with terminated_as_interrupted():
            launched = experiment.launch(folder=folder, resume=_resumed(resume, folder), timeout=timeout,
                                         max_restarts=max_restarts, detach=detach, wait=not detach)
    except RankError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(_EXITS[error.status]) from None
    except KeyboardInterrupt:
        raise typer.Exit(_EXITS["stopped"]) from None
    if detach:
        print(launched.id)
        return
    raise typer.Exit(_EXITS[launched.status])


@app.command()
def check(file: _File, changes: _Changes = None) -> None:
    """Every conflict between the cells, their files and the model. Exit code 2 where it cannot start."""
    report = _experiment(file, changes).check()
    print(report)
    raise typer.Exit(0 if report.ok else MISTAKE)


@app.command()
def plan(file: _File, changes: _Changes = None,
         gpu: Annotated[str | None, typer.Option(help="Of which GPU: H200, 3090, ... Default: of a CPU.")] = None,
         figure: Annotated[Path | None, typer.Option(help="Write the picture of a step's memory there.")] = None,
         ) -> None:
    """Memory of a step by what it is for, before anything runs. Exit code 1 where it does not fit."""
    from collie_lab.view.units import bytes_text

    _check_figure(figure)
    found = _experiment(file, changes).plan(gpu, course=figure is not None)
    print(found)
    _print_table(found.components.map(bytes_text))
    if figure is not None:
        _save_figure(found.figure(), figure)
    raise typer.Exit(int(found.fits is False))


@app.command()
def fit(model: Annotated[str, typer.Argument(help="A hub id, a folder, a shape, or an experiment's YAML.")],
        gpus: Annotated[int, typer.Option(help="How many.")] = 8,
        gpu: Annotated[str, typer.Option(help="Which: H200, 3090, ...")] = "H100",
        goal: Annotated[str, typer.Option(help="throughput, or memory.")] = "throughput",
        length: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
        batch_size: Annotated[int | None, typer.Option(help="Sequences of an optimizer step.")] = None,
        methods: Annotated[list[str] | None, typer.Option("--method", help="AdamW, LOMO, ... As often as wanted.")]
        = None,
        confirm: Annotated[int, typer.Option(help="How many of the best to run on tensors without values.")] = 3,
        to: Annotated[Path | None, typer.Option(metavar="EXP.yaml", help="Write the best experiment there.")] = None,
        ) -> None:
    """Layouts, methods and micro-batches that fit, ranked; why the others do not. Exit code 1 where none does."""
    from collie_lab.planning import fit as find

    found = find(_model(model), gpus, gpu, goal=goal, length=length,  # type: ignore[arg-type]
                 batch_size=batch_size, methods=methods or None, confirm=confirm)
    if len(found):
        _print_table(found.table().head(20), index=False)
    if len(found.refused):
        _print_table(found.reasons, index=False)
    if to is not None and len(found):
        to.parent.mkdir(parents=True, exist_ok=True)
        found.best.experiment.to_yaml(to)
        print(to)
    raise typer.Exit(int(not found))


@app.command()
def runs(folder: _Folder = Path("runs")) -> None:
    """The runs in a folder, oldest first."""
    import pandas as pd

    from collie_lab.launch import runs as runs_in
    from collie_lab.view.units import bytes_text, count_text, duration_text, number_text

    rows = []
    for each in runs_in(folder):
        summary = each.summary
        rows.append({"run": each.id, "status": each.status, "step": each.steps, "loss": number_text(summary["loss"]),
                     "peak": bytes_text(summary["peak_bytes"]), "tok/s": count_text(summary["tokens_per_second"]),
                     "time": duration_text(summary["seconds"])})
    if not rows:
        print(f"no runs in {folder}")
        return
    _print_table(pd.DataFrame(rows).set_index("run"))


@app.command()
def residuals(folder: _Folder = Path("runs"),
              figure: Annotated[Path | None, typer.Option(help="Write the picture there.")] = None) -> None:
    """What the plans of all runs were worth: planned and measured peak memory, and the errors by component."""
    from collie_lab.planning import residuals as over

    _check_figure(figure)
    found = over(folder)
    if len(found.frame):
        _print_table(found.table())
    print(found)
    if figure is not None:
        _save_figure(found.figure(), figure)


@app.command()
def doctor(model: Annotated[str, typer.Argument(help="A hub id, a folder, a shape, or an experiment's YAML.")],
           ranks: Annotated[int, typer.Option(help="Processes of a layout.")] = 2,
           checks: Annotated[list[str] | None, typer.Option("--check", help="This one. As often as wanted. Default: "
                                                                            "all.")] = None) -> None:
    """Whether a model trains the same under every layout on this machine. Exit code 1 where not."""
    from collie_lab.diagnosis import doctor as examine

    raise typer.Exit(int(not examine(_model(model), ranks=ranks, checks=checks or None).ok))


@app.command()
def export(runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs by their ids or folders; NAME=RUN "
                                                                            "names a row.")],
           to: Annotated[Path, typer.Option(help="Where the files go.")], folder: _Folder = Path("runs")) -> None:
    """Runs side by side: a table (CSV, Markdown, LaTeX), a figure, and where each row comes from."""
    from collie_lab.study import Results

    rows: dict[str, Run] = {}
    for given in runs:
        name, found = _row(given, folder)
        if rows.setdefault(name or found.id, found) is not found:
            raise CellError([Problem("export", "", f"two rows are called {name or found.id!r}",
                                     "another name for one of them: NAME=RUN")])
    for path in Results(rows).export(to):
        print(path)


# --- what the commands share


def _experiment(file: Path, changes: Sequence[str] | None) -> Experiment:
    """The experiment of a file, with `--set` changes; their values are YAML."""
    experiment = Experiment.from_yaml(file)
    for path, value in parse_changes(changes).items():
        experiment = experiment.with_(path, value)
    return experiment


def _model(name: str) -> Model | Experiment:
    """A model by name; a shape has random weights alone."""
    if name.endswith((".yaml", ".yml")):
        return Experiment.from_yaml(name)
    model = Model(name)
    return model.replace(init="random") if model.is_shape else model


def _check_figure(path: Path | None) -> None:
    """Raise, before the work, where nothing can be drawn to a file of this name."""
    if path is None:
        return
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise CellError([Problem("--figure", "", f"{path} is no file of a picture", "its end: ." + ", .".join(known))])


def _save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    print(path)


def _resumed(resume: str | None, folder: Path) -> Run | str | None:
    return resume if resume is None or Path(resume).exists() else _attached(resume, folder)


def _row(given: str, folder: Path) -> tuple[str, Run]:
    """The name and the run of NAME=RUN. A folder may have a `=` too: the longest end that is one is the run."""
    parts = given.split("=")
    for cut in range(len(parts)):
        end = "=".join(parts[cut:])
        if any((place / "launch.json").is_file() for place in (Path(end), folder / end)):
            return "=".join(parts[:cut]), _attached(end, folder)
    name, _, id_ = given.rpartition("=")
    return name, _attached(id_, folder)


def _attached(name: str, folder: Path) -> Run:
    from collie_lab.launch import attach

    try:
        return attach(name, folder)
    except ValueError as error:
        raise CellError([Problem("run", "", str(error))]) from None


def _print_table(frame: pd.DataFrame, index: bool = True) -> None:
    """Aligned text, as wide as it is: what follows in a pipe sees whole lines."""
    print((frame.reset_index() if index else frame).to_string(index=False))
