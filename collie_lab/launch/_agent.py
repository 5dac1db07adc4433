"""torchrun, the agent that starts the ranks: its command line and what its log says of them.

torchrun reports exit codes in text only. `started_closing` recognises its first words after a rank has
failed, `exits` its closing report. Should their form change, a run still ends; only the codes are unknown.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Exit", "before_closing", "command", "exits", "started_closing"]


class Exit(NamedTuple):
    """How one rank ended: negative codes are signals."""

    rank: int
    code: int
    pid: int


_TORCHRUN: Final = Path(__file__).with_name("_torchrun.py")
_REPORT = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+) \(pid: (\d+)\)")
_CLOSING = re.compile(r"Sending process \d+ closing signal|failed \(exitcode: -?\d+\)")


def command(module: str, ranks: int, folder: str, rendezvous: Sequence[str] = ("--standalone",)) -> list[str]:
    """The command that runs `module` on so many ranks of this machine; `rendezvous` tells of the other machines."""
    # Ranks write their logs and errors to the run folder; a log directory of torchrun's own would be left in /tmp.
    return [sys.executable, "-P", str(_TORCHRUN), *rendezvous, "--nproc-per-node", str(ranks),
            "--log-dir", os.devnull, "-m", module, folder]


def started_closing(log: str) -> bool:
    """Whether a rank has failed: torchrun then ends the others."""
    return _CLOSING.search(log) is not None


def before_closing(log: str) -> str:
    """What stood in the log before torchrun spoke of a failed rank: words of ranks that had no log yet."""
    match = _CLOSING.search(log)
    return log[: log.rfind("\n", 0, match.start()) + 1] if match else log


def exits(log: str) -> list[Exit]:
    """Ranks that did not end with code 0, from the closing report: torchrun's first suspect first."""
    found = [Exit(int(rank), int(code), int(pid)) for rank, code, pid in _REPORT.findall(log)]
    _, _, suspect = log.partition("Root Cause")
    first = {exit_.rank for exit_ in exits(suspect)[:1]} if suspect else set()
    return sorted(found, key=lambda exit_: exit_.rank not in first)
