"""How the machines of a run know of each other: by small files in the run folder, which all of them share.

Every node has a beacon, `nodes/<number>.json`, that it rewrites once a second: the others see that it lives, and what
it says. Node 0, the notebook's machine, says when to begin and to end; the others say how their part has ended. No
clock of one machine is compared with another's: a beacon that has not *changed* for `silence` seconds is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from collie_lab.folder import RunFolder

__all__ = ["SILENCE", "Beacon", "Sight", "claim", "rendezvous", "sockets", "way_to"]

#: Seconds without a sign of life after which a node counts as lost: more than a busy file server's pauses.
SILENCE: Final = 15.0

_BEAT, _LOOK = 1.0, 0.25


class Beacon:
    """A node's own words.

    The file is rewritten in place: on a network file system a new name may be seen late, but the content of a file
    that is opened anew is not. A reader that catches it half written waits for the next time.
    """

    def __init__(self, folder: RunFolder, node: int):
        self._path = folder.node(node)
        self._facts: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "beat": 0}
        self._written = 0.0

    def say(self, **facts: Any) -> None:
        """Add to what the node says, at once."""
        self._facts |= facts
        self._write()

    def beat(self) -> None:
        """Show a sign of life, where the last is old enough."""
        if time.monotonic() > self._written + _BEAT:
            self._write()

    def _write(self) -> None:
        self._facts["beat"] += 1
        self._written = time.monotonic()
        with contextlib.suppress(OSError):  # no more than a missing sign of life
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                text = json.dumps(self._facts).encode()
                os.pwrite(handle, text, 0)
                os.ftruncate(handle, len(text))
            finally:
                os.close(handle)


class Sight:
    """What one sees of another node."""

    def __init__(self, folder: RunFolder, node: int, silence: float):
        self._path, self._silence = folder.node(node), silence
        self._facts: dict[str, Any] = {}
        self._looked, self._changed = 0.0, time.monotonic()
        self.host = ""
        """The name of its machine, once it has come."""
        self.lost = False
        """Whether it has shown no sign of life for too long."""

    def look(self) -> dict[str, Any]:
        """The node's last words; empty where it has not come."""
        now = time.monotonic()
        if now > self._looked + _LOOK:
            facts = _read(self._path)
            if facts is not None and facts != self._facts:
                self._facts, self._changed = facts, now
                self.host = facts.get("host", self.host)
            self._looked = now
            self.lost = self._facts.get("state") != "ended" and now > self._changed + self._silence
        return self._facts

    def forget(self) -> None:
        """Have it that the node has never come."""
        self._path.unlink(missing_ok=True)
        self._facts, self.host = {}, ""


def claim(folder: RunFolder, count: int) -> int | None:
    """Take the lowest free number from 1 to `count` - 1 for this process; None where all are taken."""
    for node in range(1, count):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(folder.node(node), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            Beacon(folder, node).say(state="waiting")
            return node
    return None


def rendezvous(nodes: Mapping[str, Any], node: int, run: str) -> list[str]:
    """The options by which torchrun finds the other nodes.

    torchrun numbers the nodes in the order of what they give for their address, and only the first one's is ever
    dialled. The others give a word that sorts behind every name, so that node k holds the k-th share of the ranks.
    """
    own = nodes["address"] if node == 0 else f"~{node:06d}"
    return ["--nnodes", str(nodes["count"]), "--rdzv-backend", "c10d", "--rdzv-id", run,
            "--rdzv-endpoint", f"{nodes['address']}:{nodes['port']}",
            "--rdzv-conf", f"is_host={int(node == 0)}", "--local-addr", own]


def way_to(address: str, port: int) -> str | None:
    """The network interface of this machine that leads to an address, or has it. Nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        own = probe.getsockname()[0]
        return next((name for name, found in psutil.net_if_addrs().items()
                     if any(entry.address == own for entry in found)), None)
    return None


def sockets(interface: str | None) -> dict[str, str]:
    """The environment that has gloo and NCCL use an interface. Left to themselves they look up the host's name, which
    on many machines is a loopback address."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"} if interface else {}


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a beacon; empty where there is none, None where it could not be read this time."""
    try:
        facts: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return None
    return facts
