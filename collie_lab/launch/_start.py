"""From an experiment to a run: check, write the run folder, start the supervisor, and wait."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collie_lab import code
from collie_lab.cells import CellError, Experiment, Nodes, Problem
from collie_lab.cells._yaml import dump
from collie_lab.check import check_resume
from collie_lab.folder import RunFolder
from collie_lab.launch import _several
from collie_lab.launch._supervise import environment, module_paths, start_supervisor
from collie_lab.launch.pool import Pool
from collie_lab.launch.run import Run

__all__ = ["launch"]


def launch(experiment: Experiment, *, wait: bool = True, folder: str | Path = "runs",
           resume: Run | str | Path | None = None, detach: bool = False, max_restarts: int = 0,
           timeout: float | None = None, stall_timeout: float | None = 1800.0, grace: float = 3.0,
           env: Mapping[str, str] | None = None, pool: Pool | None = None, nodes: Nodes | None = None,
           show: bool = True, plan: bool = True, _module: str = "collie_lab.training.worker") -> Run:
    """Start an experiment in processes of its own and return its handle.

    With `wait` the call returns at the end and raises `RankError` if the run failed; without, at once.
    `show` draws the run as it goes. An interrupt stops the run after the step it is in; if the ranks do not heed that
    within `grace` seconds (two steps, where a step takes longer), or at a second interrupt, it is killed.
    `resume` continues from a run's newest checkpoint, or from the given one. With `detach` the run outlives this
    process; `lab.attach(id)` finds it again. After a failure other than want of GPU memory the ranks are begun again up
    to `max_restarts` times, from the newest checkpoint; what an attempt leaves is kept in `attempts/`.
    `timeout` ends the run after so many seconds; `stall_timeout` ends it when a rank that has begun to step has shown
    no sign of life for so long, names that rank and keeps the stacks of all (`run.stacks()`).
    `env` adds to the environment of the ranks. The run gets a new folder in `folder`.
    With a `pool` its warm ranks take the run, instead of new processes.
    With `nodes` the ranks are shared among several machines. All of them have to see `folder`, and on each of the
    others one runs the command that is printed. `env` is then written to the run folder, for these machines.
    With `plan` its forecast is made meanwhile, at the lowest priority, and kept in the run folder: `run.plan`.
    """
    report = experiment.check()
    report.raise_for_errors()
    for problem in report.warnings:
        warnings.warn(str(problem), stacklevel=3)
    world_size = experiment.parallel.world_size
    _check_numbers(max_restarts, timeout=timeout, stall_timeout=stall_timeout, grace=grace)
    _check_options(world_size, pool, nodes, detach=detach, max_restarts=max_restarts, env=env)
    checkpoint = _checkpoint(resume)
    mapping, packed = code.pack(experiment)
    run_folder = RunFolder.create(folder, experiment.name)
    process = None
    try:
        (run_folder.path / "experiment.yaml").write_text(dump(mapping), encoding="utf-8")
        if packed:
            (run_folder.path / "code.pkl").write_bytes(packed)
        run_folder.reserve()
        _prepare(experiment, run_folder)
        if checkpoint is not None:
            check_resume(experiment, run_folder.read("data/index.json").get("fingerprint", ""), Path(checkpoint))
        run_folder.write("launch.json", {
            "world_size": world_size, "created": time.time(), "cwd": os.getcwd(), "sys_path": module_paths(),
            "resume_from": checkpoint, "launched_from": checkpoint, "grace": grace, "timeout": timeout,
            "stall_timeout": stall_timeout, "max_restarts": max_restarts,
            "kernel_pid": None if detach else os.getpid(), "module": _module,
            "pooled": pool is not None, "nodes": _several.plan(nodes, run_folder, env or {}) if nodes else None,
        })
        if pool is not None:
            pool.begin(run_folder)
        else:
            process = start_supervisor(run_folder, "lead", _variables(world_size, nodes, env or {}))
    except BaseException:
        shutil.rmtree(run_folder.path, ignore_errors=True)
        raise
    if nodes is not None:
        print(_several.invitation(nodes, run_folder), flush=True)
    if plan:
        _plan(experiment, run_folder)
    run = Run(run_folder, _owner=process or pool)
    if wait:
        _see_to_the_end(run, show)
    elif show:
        _show(run, wait=False)
    return run


def _check_numbers(max_restarts: int, **options: float | None) -> None:
    """Raise where one of them is no number, or below zero; restarts are counted."""
    if not isinstance(max_restarts, int) or isinstance(max_restarts, bool) or max_restarts < 0:
        raise CellError([Problem("launch", "max_restarts", f"a whole number, 0 or more, got {max_restarts!r:.60}")])
    for name, value in options.items():
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0):
            raise CellError([Problem("launch", name, f"a number, 0 or more, got {value!r:.60}")])


def _check_options(world_size: int, pool: Pool | None, nodes: Nodes | None, **others: Any) -> None:
    """Raise where a pool, or several machines, cannot do what else is asked for."""
    for name, value, kind in (("pool", pool, Pool), ("nodes", nodes, Nodes)):
        if value is not None and not isinstance(value, kind):
            raise CellError([Problem("launch", name, f"got {value!r:.60}", f"lab.{kind.__name__}(...)")])
    if any(not isinstance(text, str) for pair in (others["env"] or {}).items() for text in pair):
        raise CellError([Problem("launch", "env", "variables and their values are text", 'env={"NAME": "1"}')])
    if pool is not None:
        asked = [name for name, value in {**others, "nodes": nodes}.items() if value]
        if asked:
            raise CellError([Problem("launch", asked[0], "a pool has processes of its own, on this machine, that end "
                                     "with it", "leave it out, or launch without the pool")])
        pool.check(world_size)
    if nodes is not None:
        _several.check(nodes, world_size)
        if others["max_restarts"]:
            raise CellError([Problem("launch", "max_restarts", "runs on several machines are not begun again by "
                                     "themselves", "leave it out; `resume=` goes on from the newest checkpoint")])


def _variables(world_size: int, nodes: Nodes | None, env: Mapping[str, str]) -> dict[str, str]:
    """The environment of the supervisor, and so of the ranks."""
    variables = {**environment(world_size // nodes.count if nodes else world_size, module_paths()), **env}
    return variables if nodes is None else _several.on_network(variables, nodes.address, nodes.port, nodes.interface)


def _prepare(experiment: Experiment, folder: RunFolder) -> None:
    from collie_lab.data import prepare

    prepare(experiment, folder)


def _plan(experiment: Experiment, folder: RunFolder) -> None:
    from collie_lab.planning.kept import keep

    keep(experiment, folder)


def _checkpoint(resume: Run | str | Path | None) -> str | None:
    """The checkpoint to resume from: `resume` itself, or the newest one of the run that it names."""
    if resume is None:
        return None
    path = (resume.folder.path if isinstance(resume, Run) else Path(resume).expanduser()).resolve()
    newest: Path | None = path
    if (path / "launch.json").is_file():
        newest = RunFolder(path).latest_checkpoint()
    if newest is None or not newest.is_dir():
        what = "has no checkpoint" if newest is None else "is no folder"
        raise CellError([Problem("launch", "resume", f"{path} {what}",
                                 "give a run, its folder, or one of its checkpoints; "
                                 "`Training(checkpoint_every=...)` has a run write them")])
    return str(newest)


def _see_to_the_end(run: Run, show: bool) -> None:
    """Wait, with a view if wanted; the first interrupt stops the run, the next kills it."""
    interrupts = 0
    while True:
        try:
            if show:
                _show(run, wait=True)
            run.wait()
            break
        except KeyboardInterrupt:
            interrupts += 1
            run.stop() if interrupts == 1 else run.kill()
    if error := run.error:
        raise error
    if interrupts and not run.result:
        raise KeyboardInterrupt(run.detail)


def _show(run: Run, wait: bool) -> None:
    """Draw the run as it goes. A picture that fails must not lose the handle of a run that goes on."""
    from collie_lab.view import watch

    try:
        watch(run, wait=wait, stops=True)
    except Exception as error:
        warnings.warn(f"the view of {run.id} failed: {error!r}; the run itself goes on", stacklevel=3)
