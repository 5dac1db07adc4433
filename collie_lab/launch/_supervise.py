"""Starts supervisors, with the environment that ranks are to have."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

import collie_lab
from collie_lab import code
from collie_lab.folder import RunFolder
from collie_lab.machine import usable_cpus

__all__ = ["environment", "module_paths", "start_supervisor"]

#: Supervisors that this process has started: kept until they have ended and are collected.
_supervisors: list[subprocess.Popen[bytes]] = []

#: What a torchrun around the kernel, or an earlier one in it, would tell our ranks.
_FOREIGN: Final = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME",
    "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)


def environment(ranks: int, paths: Sequence[str]) -> dict[str, str]:
    """The environment of so many ranks on this machine that find modules in `paths`: this process's own, without what
    would mislead them."""
    result = {name: value for name, value in os.environ.items()
              if name not in _FOREIGN and not name.startswith(("TORCHELASTIC_", "PET_"))}
    if result.get("MPLBACKEND", "").startswith("module://"):
        del result["MPLBACKEND"]  # the kernel's inline figures
    result.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // ranks)))
    result.setdefault("TOKENIZERS_PARALLELISM", "false")
    return result | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def module_paths() -> list[str]:
    """Where this process finds modules, save what every interpreter finds by itself; and collie_lab."""
    own = str(Path(collie_lab.__file__).resolve().parent.parent)
    paths = [os.path.abspath(path) for path in sys.path]
    return list(dict.fromkeys(path for path in [*paths, own] if not code.is_installed(path)))


def start_supervisor(folder: RunFolder, role: Literal["lead", "pool"],
                     env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a supervisor in a session of its own, out of reach of the kernel's interrupts."""
    _supervisors[:] = [process for process in _supervisors if process.poll() is None]
    command = [sys.executable, "-P", str(Path(__file__).with_name("_boot.py")), str(folder.path), role]
    log = folder.launcher_log()
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   start_new_session=True, env=dict(env))
    _supervisors.append(process)
    try:
        while not (folder.path / "status.json").exists():
            if process.poll() is not None:
                words = log.read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"the supervisor did not start:\n{words}")
            time.sleep(0.005)
    except BaseException:  # an interrupt: nobody would hold on to it
        process.kill()
        process.wait()
        raise
    return process
