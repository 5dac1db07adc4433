"""`collie-lab study run|status|report|export|retry FILE`: a study from a shell.

Exit codes: 0, every arm is ok; 1, all have ended, but not all well; 2, a mistake in the grid or the options, nothing
was started; 3, some have not ended; 130, interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from collie_lab.shell import Group, parse_changes, terminated_as_interrupted

if TYPE_CHECKING:
    from collie_lab.study.study import Study

__all__ = ["study_app"]

OK, FAILED, UNFINISHED, INTERRUPTED = 0, 1, 3, 130

study_app = typer.Typer(cls=Group, help="Grids of experiments: run what is missing, look at it, export it.",
                        no_args_is_help=True, pretty_exceptions_enable=False)

File = Annotated[Path, typer.Argument(help="The grid: a YAML file.", show_default=False)]
Profile = Annotated[str | None, typer.Option(help="One of its profiles.")]
Results = Annotated[Path | None, typer.Option(help="Where the results are. Default: results/<name>-<profile>.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change the grid's base: data.source=alpaca.json")]

_EPILOG: Final = ("Exit code 0: every arm is ok; 1: all have ended, not all of them well; 2: a mistake, nothing was "
                  "started; 3: some have not ended; 130: interrupted.")


def _asked(what: str) -> Any:
    return typer.Option(help=what, rich_help_panel="What an arm asks of a cluster")


@study_app.command(epilog=_EPILOG)
def run(file: File, profile: Profile = None, results: Results = None, changes: Changes = None,
        slots: Annotated[int | None, typer.Option(help="Arms at once. Default: 1; as GPUs or a cluster allow.")] = None,
        executor: Annotated[str, typer.Option(help="Where arms run: local, slurm or ray.")] = "local",
        fresh_code: Annotated[bool, typer.Option("--fresh-code", help="Again what another version has made.")] = False,
        partition: Annotated[str | None, _asked("Slurm's. Default: the cluster's own.")] = None,
        time: Annotated[str | None, _asked("Of a job of Slurm's: 90 (minutes), 4:00:00, 1-12.")] = None,
        gpus: Annotated[str | None, _asked("Their type, any, or none. Every rank gets one.")] = None,
        cpus: Annotated[int | None, _asked("For each rank.")] = None,
        memory: Annotated[str | None, _asked("Of the host, for an arm: 64GB.")] = None,
        address: Annotated[str | None, _asked("Of a Ray that runs: auto, 10.0.0.1:6379.")] = None) -> None:
    """Run every arm that has no result yet. Interrupted, arms stop with a checkpoint, and go on from it next time."""
    from collie_lab.study.executor import cluster

    asked = {"partition": partition, "time": time, "gpus": gpus, "cpus": cpus, "memory": memory, "address": address}
    settings = {name: value for name, value in asked.items() if value is not None}
    with terminated_as_interrupted():
        study = _study(file, profile, results, changes)
        place = cluster(executor, **settings) if settings else executor
        try:
            study.run(slots=slots, executor=place, fresh_code=fresh_code)
        except KeyboardInterrupt:
            _tell(study)
            raise typer.Exit(INTERRUPTED) from None
    _leave(study)


@study_app.command(epilog=_EPILOG)
def status(file: File, profile: Profile = None, results: Results = None, changes: Changes = None,
           check: Annotated[bool, typer.Option("--check", help="Also look for conflicts in what is missing.")] = False,
           forecast: Annotated[bool, typer.Option("--forecast", help="Also what the arms need.")] = False,
           gpu: Annotated[str | None, typer.Option(help="On which GPU; for the forecast.")] = None) -> None:
    """What became of each arm so far."""
    study = _study(file, profile, results, changes)
    for name, state in study.statuses().items():
        print(f"{state:9}  {name}")
    if check:
        print(study.check())
    if forecast:
        print(study.forecast(gpu).to_string())
    _leave(study)


@study_app.command()
def retry(file: File, profile: Profile = None, results: Results = None, changes: Changes = None,
          status: Annotated[list[str] | None, typer.Option(help="Arms with this status; may be given twice.")] = None,
          arm: Annotated[list[str] | None, typer.Option(help="The arm of this name; may be given twice.")] = None,
          anew: Annotated[bool, typer.Option("--anew", help="From the beginning, not from a checkpoint.")] = False,
          ) -> None:
    """Have finished arms run again at the next `run`."""
    for name in _study(file, profile, results, changes).retry(status or None, arm or None, resume=not anew):
        print(name)


@study_app.command()
def export(file: File, out: Annotated[Path, typer.Argument(help="A folder, or a .zip.")], profile: Profile = None,
           results: Results = None, changes: Changes = None) -> None:
    """Tables, figures, notebooks and raw results in one folder or zip."""
    _study(file, profile, results, changes).export(out)


@study_app.command()
def report(file: File, out: Annotated[Path, typer.Argument(help="An .html file.")], profile: Profile = None,
           results: Results = None, changes: Changes = None) -> None:
    """One HTML page that needs nothing else."""
    _study(file, profile, results, changes).report(out)


def _study(file: Path, profile: str | None, results: Path | None, changes: list[str] | None) -> Study:
    from collie_lab.study.study import Study

    return Study(file, profile, results, parse_changes(changes))


def _tell(study: Study) -> None:
    """The summary, and what became of each arm that is not ok."""
    from collie_lab.study.store import summary_text

    statuses = study.statuses()
    print(f"{study.name}: {summary_text(statuses.values())} in {study.results}")
    for name, state in study.reasons().items():
        print(f"  {statuses[name].replace('_', ' ')}: {name}: {state}")


def _leave(study: Study) -> NoReturn:
    """Tell how the study stands, and end with the exit code that says it."""
    from collie_lab.study.store import FINAL

    _tell(study)
    statuses = set(study.statuses().values())
    raise typer.Exit(OK if statuses <= {"ok"} else FAILED if statuses <= {*FINAL} else UNFINISHED)
