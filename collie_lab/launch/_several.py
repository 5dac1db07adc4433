"""What a launch on several machines checks, writes for the others, and says to people."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import socket
from collections.abc import Mapping
from typing import Any

import psutil

from collie_lab._version import __version__
from collie_lab.cells import CellError, Nodes, Problem
from collie_lab.folder import RunFolder
from collie_lab.launch import _nodes

__all__ = ["check", "command", "invitation", "on_network", "plan", "versions"]


def check(nodes: Nodes, world_size: int) -> None:
    """Raise what would keep the nodes from finding each other, as far as this machine can know it."""
    problem = (_uneven(nodes, world_size) or _foreign(nodes.address) or _taken(nodes.port)
               or (no_interface(nodes.interface) if nodes.interface else None))
    if problem is not None:
        raise CellError([problem])


def plan(nodes: Nodes, folder: RunFolder, env: Mapping[str, str]) -> dict[str, Any]:
    """What the supervisors of all nodes read in `launch.json`; makes the place for their beacons."""
    folder.node(0).parent.mkdir()
    return {"count": nodes.count, "address": nodes.address, "port": nodes.port, "interface": nodes.interface,
            "timeout": nodes.timeout, "silence": _nodes.SILENCE, "env": dict(env), "versions": versions(),
            "command": command(folder)}


def command(folder: RunFolder) -> str:
    """What one runs on the other machines."""
    return f"python -m collie_lab.launch.join {shlex.quote(str(folder.path))}"


def invitation(nodes: Nodes, folder: RunFolder) -> str:
    """What a launch prints."""
    others = "the other machine" if nodes.count == 2 else f"each of the other {nodes.count - 1} machines"
    return f"{folder.id} waits for {nodes.count} machines. On {others}, run:\n    {command(folder)}"


def versions() -> dict[str, str]:
    """What has to be the same on all machines: functions travel as bytecode, and ranks speak torch's own protocols."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, "torch": importlib.metadata.version("torch"), "collie_lab": __version__}


def on_network(env: Mapping[str, str], address: str, port: int, interface: str | None) -> dict[str, str]:
    """An environment with the network interface of the ranks; one that it names itself stays, unless another is given.
    """
    if interface is not None:
        return {**env, **_nodes.sockets(interface)}
    return {**_nodes.sockets(_nodes.way_to(address, port)), **env}


def no_interface(name: str) -> Problem | None:
    """What is wrong with the name of a network interface, if this machine has none such."""
    known = psutil.net_if_addrs()
    return None if name in known else Problem(
        "Nodes", "interface", f"this machine ({socket.gethostname()}) has no network interface {name!r}",
        f"it has: {', '.join(sorted(known))}; without `interface` each machine takes the one that leads to `address`")


def _uneven(nodes: Nodes, world_size: int) -> Problem | None:
    if world_size % nodes.count == 0:
        return None
    return Problem("Nodes", "count", f"{world_size} ranks (dp x tp x pp) cannot be shared evenly among "
                                     f"{nodes.count} machines",
                   f"choose a layout whose ranks are a multiple of {nodes.count}, or another number of machines")


def _foreign(address: str) -> Problem | None:
    own = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries
           if entry.family == socket.AF_INET}
    try:
        number = socket.gethostbyname(address)
    except OSError as error:
        return Problem("Nodes", "address", f"{address!r} cannot be resolved: {error}")
    if number in own:
        return None
    known = ", ".join(f"{known} ({name})" for known, name in own.items())
    resolved = "" if number == address else f" is {number}, which"
    return Problem("Nodes", "address", f"{address}{resolved} is no address of this machine",
                   f"give one by which the other machines reach it; it has: {known}")


def _taken(port: int) -> Problem | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return Problem("Nodes", "port", f"port {port} of this machine cannot be used: {error.strerror}",
                           "give another `port`")
    return None
