"""From what is left of a run to its `status.json`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from collie_lab.beat import read_beats
from collie_lab.folder import read_json
from collie_lab.launch import _processes, _stacks
from collie_lab.launch._course import Course
from collie_lab.launch._verdict import Cause, Facts, Report, Verdict, judge

__all__ = ["conclude", "write_status"]


def conclude(course: Course, reports: Mapping[int, Report | None], absent: Sequence[str] = ()) -> tuple[Cause, Verdict]:
    """Judge a run by the reports of its nodes (None for one that is lost), and write its last status.

    `absent` has a sentence on every node that did not come, or was lost.
    """
    folder, plan = course.folder, course.plan
    codes = {node: report.agent_code if report else None for node, report in reports.items()}
    bad = next((node for node, code in codes.items() if code != 0), 0)
    ended = [report for report in reports.values() if report is not None]
    cause: Cause = "stalled" if any(report.cause == "stalled" for report in ended) else ended[0].cause
    exits = [exit_ for report in ended for exit_ in report.exits]
    beats = read_beats(folder)
    verdict = judge(Facts(
        cause=cause, agent_code=codes[bad], exits=exits,
        records=[read_json(path) for path in sorted(folder.errors.glob("rank-*.json"))],
        result=folder.read("result.json"),
        signalled=frozenset(number for report in ended for number in report.signalled),
        oom_kills=sum(report.oom_kills for report in ended),
        beats=beats, suspects=_stacks.suspects(beats, _stacks.kept(folder)) if cause == "stalled" else (),
        grace=plan["grace"], timeout=plan["timeout"], stall_timeout=plan["stall_timeout"],
        absent=absent, log=folder.launcher_log(bad).name,
    ))
    all_codes = dict.fromkeys(range(plan["world_size"]), 0) if codes[bad] == 0 else {}
    all_codes |= {exit_.rank: exit_.code for exit_ in exits}
    write_status(course, **dataclasses.asdict(verdict), ended=time.time(),
                 exit_codes={str(number): code for number, code in sorted(all_codes.items())})
    return cause, verdict


def write_status(course: Course, status: str, **more: Any) -> None:
    """Write a run's status, in the name of this process."""
    course.folder.insist("status.json", {
        "status": status, **_processes.identity(os.getpid()), "started": course.began, "ended": None,
        "exit_codes": {}, "detail": "", "rank": None, "attempts": course.attempts,
        "pooled": course.plan.get("pooled", False), **more,
    })
