"""Adds this machine to a run that waits for it: `python -m collie_lab.launch.join <run folder>`.

The command lives as long as the run, and ends with 0 if the run did not fail. Ending it ends the ranks here, and with
them the run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from collie_lab.folder import RunFolder
from collie_lab.launch import _several
from collie_lab.launch._supervise import environment, module_paths

__all__ = ["join", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m collie_lab.launch.join", description=__doc__)
    parser.add_argument("folder", type=Path, help="the run folder, on a file system that all machines share")
    parser.add_argument("--interface", help="the network interface of this machine, instead of the launch's choice")
    options = parser.parse_args(arguments)
    try:
        join(options.folder, options.interface)
    except ValueError as error:
        sys.exit(f"cannot join {options.folder}: {error}")


def join(path: str | Path, interface: str | None = None) -> None:
    """Become the supervisor of this machine's part of a run; this process never returns from it.

    Raises ValueError where there is no such run, or it is not for this machine.
    """
    folder = RunFolder(path)
    launch = folder.read("launch.json")
    if not launch:
        raise ValueError("there is no run in this folder. It has to lie on a file system that this machine shares with "
                         "the notebook's: give `launch(folder=...)` such a place")
    plan = launch["nodes"]
    if plan is None:
        raise ValueError("this run was launched for one machine; `launch(nodes=lab.Nodes(...))` is for several")
    state, own = folder.read("status.json"), _several.versions()
    if state.get("ended"):
        raise ValueError(f"the run is over: {state['status']}")
    if own != plan["versions"]:
        raise ValueError(f"the notebook's machine has {_listed(plan['versions'])}; this one has {_listed(own)}")
    interface = interface or plan["interface"]
    if interface and (problem := _several.no_interface(interface)):
        raise ValueError(problem.message + " → " + problem.remedy)
    paths = list(dict.fromkeys([*launch["sys_path"], *module_paths()]))
    env = environment(launch["world_size"] // plan["count"], paths) | plan["env"]
    env = _several.on_network(env, plan["address"], plan["port"], interface)
    if os.path.isdir(launch["cwd"]):
        os.chdir(launch["cwd"])  # relative paths mean the same
    boot = str(Path(__file__).with_name("_boot.py"))
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-P", boot, str(folder.path), "join"], env)


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


if __name__ == "__main__":
    main()
