"""From an experiment to a run: check, write the run folder, start the supervisor, and wait."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import yaml

import collie_lab
from collie_lab import code
from collie_lab.cells import CellError, Experiment, Nodes, Problem
from collie_lab.check import check_resume
from collie_lab.folder import RunFolder
from collie_lab.launch import _several
from collie_lab.launch.run import Run

__all__ = ["environment", "launch", "module_paths"]

#: Supervisors that this process has started: kept until they have ended and are collected.
_supervisors: list[subprocess.Popen[bytes]] = []

#: What a torchrun around the kernel, or an earlier one in it, would tell our ranks.
_FOREIGN: Final = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME",
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)


def launch(experiment: Experiment, *, wait: bool = True, folder: str | Path = "runs",
           resume: Run | str | Path | None = None, timeout: float | None = None, grace: float = 3.0,
           env: Mapping[str, str] | None = None, nodes: Nodes | None = None, show: bool = True,
           _module: str = "collie_lab.training.worker") -> Run:
    """Start an experiment in processes of its own and return its handle.

    With `wait` the call returns at the end and raises `RankError` if the run failed; without, at once.
    `show` draws the run as it goes. An interrupt stops the run after the step it is in; if the ranks do not heed that
    within `grace` seconds (two steps, where a step takes longer), or at a second interrupt, it is killed.
    `resume` continues from a run's newest checkpoint, or from the given one. `timeout` ends the run after
    so many seconds, `env` adds to the environment of the ranks. The run gets a new folder in `folder`.
    With `nodes` the ranks are shared among several machines. All of them have to see `folder`, and on each of the
    others one runs the command that is printed. `env` is then written to the run folder, for these machines.
    """
    report = experiment.check()
    report.raise_for_errors()
    for problem in report.warnings:
        warnings.warn(str(problem), stacklevel=3)
    world_size = experiment.parallel.world_size
    if nodes is not None:
        _several.check(nodes, world_size)
    checkpoint = _checkpoint(resume)
    mapping, packed = code.pack(experiment)
    run_folder = RunFolder.create(folder, experiment.name)
    process = None
    try:
        text = yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)
        (run_folder.path / "experiment.yaml").write_text(text, encoding="utf-8")
        if packed:
            (run_folder.path / "code.pkl").write_bytes(packed)
        _prepare(experiment, run_folder)
        if checkpoint is not None:
            check_resume(experiment, run_folder.read("data/index.json").get("fingerprint", ""), Path(checkpoint))
        paths = module_paths()
        run_folder.write("launch.json", {
            "world_size": world_size, "created": time.time(), "cwd": os.getcwd(), "sys_path": paths,
            "resume_from": checkpoint, "grace": grace, "timeout": timeout, "kernel_pid": os.getpid(),
            "module": _module, "nodes": _several.plan(nodes, run_folder, env or {}) if nodes else None,
        })
        variables = {**environment(world_size // nodes.count if nodes else world_size, paths), **(env or {})}
        if nodes is not None:
            variables = _several.on_network(variables, nodes.address, nodes.port, nodes.interface)
        process = _start_supervisor(run_folder, variables)
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        shutil.rmtree(run_folder.path, ignore_errors=True)
        raise
    if nodes is not None:
        print(_several.invitation(nodes, run_folder), flush=True)
    run = Run(run_folder, _process=process)
    if wait:
        _see_to_the_end(run, show)
    elif show:
        _show(run, wait=False)
    return run


def environment(ranks: int, paths: Sequence[str]) -> dict[str, str]:
    """The environment of so many ranks on this machine that find modules in `paths`: this process's own, without what
    would mislead them."""
    result = {name: value for name, value in os.environ.items()
              if name not in _FOREIGN and not name.startswith(("TORCHELASTIC_", "PET_"))}
    if result.get("MPLBACKEND", "").startswith("module://"):
        del result["MPLBACKEND"]  # the kernel's inline figures
    result.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    result.setdefault("TOKENIZERS_PARALLELISM", "false")
    return result | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def module_paths() -> list[str]:
    """Where this process finds modules, save what every interpreter finds by itself; and collie_lab."""
    own = str(Path(collie_lab.__file__).resolve().parent.parent)
    paths = [os.path.abspath(path) for path in sys.path]
    return list(dict.fromkeys(path for path in [*paths, own] if not code.is_installed(path)))


def _prepare(experiment: Experiment, folder: RunFolder) -> None:
    from collie_lab.data import prepare

    prepare(experiment, folder)


def _checkpoint(resume: Run | str | Path | None) -> str | None:
    """The checkpoint to resume from: `resume` itself, or the newest one of the run that it names."""
    if resume is None:
        return None
    path = (resume.folder.path if isinstance(resume, Run) else Path(resume)).resolve()
    newest: Path | None = path
    if (path / "launch.json").is_file():
        newest = RunFolder(path).latest_checkpoint()
    if newest is None or not newest.is_dir():
        what = "has no checkpoint" if newest is None else "is no folder"
        raise CellError([Problem("launch", "resume", f"{path} {what}",
                                 "give a run, its folder, or one of its checkpoints; "
                                 "`Training(checkpoint_every=...)` has a run write them")])
    return str(newest)


def _start_supervisor(folder: RunFolder, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the supervisor in a session of its own, out of reach of the kernel's interrupts."""
    _supervisors[:] = [process for process in _supervisors if process.poll() is None]
    command = [sys.executable, "-P", str(Path(__file__).with_name("_boot.py")), str(folder.path), "lead"]
    log = folder.launcher_log()
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   start_new_session=True, env=dict(env))
    _supervisors.append(process)
    status = folder.path / "status.json"
    while not status.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the supervisor did not start:\n{log.read_text(encoding='utf-8', errors='replace')}")
        time.sleep(0.005)
    return process


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
