"""The failure of a run, as it reaches the notebook."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collie_lab.folder import RunFolder, read_json
from collie_lab.launch import _agent
from collie_lab.launch._verdict import how_it_ended, summary_line
from collie_lab.logs import read_log

__all__ = ["RankError", "rank_error"]

_LINES = 20


class RankError(RuntimeError):
    """A run failed.

    `rank` is the rank that failed first (None where none is to blame, as after a time-out), `traceback`
    its traceback or the end of its error log, `others` what became of the other ranks that failed.
    """

    def __init__(self, message: str, rank: int | None, traceback: str, others: dict[int, str]):
        super().__init__(message)
        self.rank = rank
        self.traceback = traceback
        self.others = others


def rank_error(folder: RunFolder, status: str) -> RankError:
    """The error of a failed run, from its folder."""
    state = folder.read("status.json")
    records: dict[int, dict[str, Any]] = {}
    for path in folder.errors.glob("rank-*.json"):
        record = read_json(path)
        records[record["rank"]] = record
    rank: int | None = state.get("rank")
    codes = {int(number): code for number, code in state.get("exit_codes", {}).items()}
    lines = {number: summary_line(record) for number, record in sorted(records.items())}
    # A rank that ended by SIGTERM did not fail: it was ended because another had.
    crashed = {number: how_it_ended(code) for number, code in codes.items() if code not in (0, -signal.SIGTERM)}
    others = {number: text for number, text in sorted({**crashed, **lines}.items()) if number != rank}
    detail = state.get("detail") or "the supervisor ended without a word"
    traceback = records[rank]["traceback"] if rank in records else _last_words(folder, rank)
    return RankError(_message(folder, status, detail, traceback, rank, lines, others), rank, traceback, others)


def _message(folder: RunFolder, status: str, detail: str, traceback: str, rank: int | None,
             lines: dict[int, str], others: dict[int, str]) -> str:
    """Status and culprit first, then the traceback's end, the other ranks by group, and the logs."""
    parts = [f"{status}: {detail}"]
    if shown := traceback.rstrip().splitlines()[-_LINES:]:
        parts += ["", *("    " + line for line in shown), ""]
    groups: dict[str, list[int]] = {}
    for number, text in others.items():
        groups.setdefault(text, []).append(number)
    same = groups.pop(lines[rank], []) if rank in lines else []
    if same:
        parts.append(f"the same on {_names(same)}")
    parts += [f"{_names(numbers)}: {text}" for text, numbers in groups.items()]
    parts.append(f"logs: {_readable(folder.logs)}")
    return "\n".join(parts)


def _names(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _last_words(folder: RunFolder, rank: int | None) -> str:
    """Where no exception was recorded: the end of the rank's error log, or what was said before there was one."""
    log = folder.log(rank, "err") if rank is not None else None
    if log is not None and log.exists():
        return read_log(log, tail=_LINES)
    return _agent.before_closing(read_log(folder.launcher_log(_node_of(folder, rank)), tail=500))


def _node_of(folder: RunFolder, rank: int | None) -> int:
    plan = folder.read("launch.json")
    return rank * plan["nodes"]["count"] // plan["world_size"] if rank and plan.get("nodes") else 0


def _readable(path: Path) -> str:
    """Relative to the working directory where that is shorter to read."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)
