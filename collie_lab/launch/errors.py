"""The failure of a run, as it reaches the notebook."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collie_lab.folder import RunFolder, read_json
from collie_lab.launch import _agent, _stacks
from collie_lab.launch._verdict import how_it_ended, summary_line
from collie_lab.logs import read_log

__all__ = ["RankError", "cell_error", "rank_error"]

_LINES = 20
_NOISE = ("nanobind: ", " - leaked ", " - ... skipped")


class RankError(RuntimeError):
    """A run failed.

    `rank` is the rank that failed first (None where none is to blame, as after a time-out), `traceback`
    its traceback or the end of its error log, `others` what became of the other ranks that failed, `status` that of
    the run.
    """

    def __init__(self, message: str, rank: int | None, traceback: str, others: dict[int, str], status: str = "error"):
        super().__init__(message)
        self.status = status
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
    stacks = _stacks.kept(folder)
    places = {number: f"was at {place}" for number, stack in stacks.items() if (place := _stacks.innermost(stack))}
    # Ranks with stacks were ended for a stall: none of them failed.
    others = {number: text for number, text in sorted((places or {**crashed, **lines}).items()) if number != rank}
    detail = state.get("detail") or "the supervisor ended without a word"
    traceback = records[rank]["traceback"] if rank in records else _stacks.main(stacks[rank]) if rank in stacks \
        else _last_words(folder, rank)
    parts = [*_account(f"{status}: {detail}", traceback, rank, lines, others), f"logs: {_readable(folder.logs)}"]
    return RankError("\n".join(parts), rank, traceback, others, status)


def cell_error(outcomes: Mapping[int, Mapping[str, Any]], deaf: Sequence[int] = (), why: str = "") -> RankError:
    """The error of a cell, from what its ranks tell (nothing where it went well).

    `deaf` are ranks that had to be ended, for `why`; with them, all were.
    """
    records = {rank: outcome for rank, outcome in sorted(outcomes.items()) if outcome}
    told = next((rank for rank, outcome in records.items() if outcome["type"] != "KeyboardInterrupt"),
                next(iter(records), None))
    lines = {rank: summary_line(record) for rank, record in records.items()}
    others = {rank: text for rank, text in lines.items() if rank != told}
    others |= dict.fromkeys(deaf, f"did not heed the interrupt ({why}), in a collective perhaps, and was ended")
    traceback = records[told]["traceback"] if told is not None else ""
    parts = _account(f"rank {told}: {lines[told]}" if told is not None else why, traceback, told, lines, others)
    if deaf:
        parts.append("all ranks were ended, and their names are lost; the next cell starts new ones")
    return RankError("\n".join(parts), told, traceback, others)


def _account(head: str, traceback: str, rank: int | None, lines: Mapping[int, str],
             others: Mapping[int, str]) -> list[str]:
    """What happened and to whom first, then the traceback's end, and the other ranks by group."""
    parts = [head]
    if shown := traceback.rstrip().splitlines()[-_LINES:]:
        parts += ["", *("    " + line for line in shown), ""]
    groups: dict[str, list[int]] = {}
    for number, text in others.items():
        groups.setdefault(text, []).append(number)
    same = groups.pop(lines[rank], []) if rank is not None and rank in lines else []
    if same:
        parts.append(f"the same on {_names(same)}")
    return parts + [f"{_names(numbers)}: {text}" for text, numbers in groups.items()]


def _names(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _last_words(folder: RunFolder, rank: int | None) -> str:
    """Where no exception was recorded: the end of the rank's error log, or what was said before there was one."""
    log = folder.log(rank, "err") if rank is not None else None
    if log is not None and log.exists():
        # What extensions complain of at the end of a process is no reason.
        return "\n".join(line for line in read_log(log, tail=500).splitlines() if not line.startswith(_NOISE))
    return _agent.before_closing(read_log(folder.launcher_log(_node_of(folder, rank)), tail=500))


def _node_of(folder: RunFolder, rank: int | None) -> int:
    plan = folder.read("launch.json")
    return rank * plan["nodes"]["count"] // plan["world_size"] if rank and plan.get("nodes") else 0


def _readable(path: Path) -> str:
    """Relative to the working directory where that is shorter to read."""
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)
