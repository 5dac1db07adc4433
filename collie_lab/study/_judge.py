"""What became of an arm, judged from what is left of it. Pure: facts in, verdict out.

The saved notebook is no witness: after its kernel was killed, every cell of it reads as completed.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field

from collie_lab.launch._verdict import how_it_ended
from collie_lab.study.store import FINAL

__all__ = ["Facts", "Outcome", "judge", "judge_program"]

#: Signals by which a process ends of its own doing.
_CRASHES = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL)
#: Those that ask an arm to stop; they end one that has not come as far as to heed them.
_REQUESTS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)


@dataclass(frozen=True)
class Facts:
    """What the parent of an arm's kernel knows at the end."""

    run_status: str | None = None
    """Of this attempt's run; None where there was none."""
    run_detail: str = ""
    raised: Mapping[str, str] = field(default_factory=dict)
    """What a cell of the notebook raised: `name`, `message`, `traceback`; empty where none did."""
    kernel_code: int | None = None
    """How the kernel ended, where it died; negative codes are signals."""
    over: str = ""
    """What the memory watch found, where the limit was exceeded."""
    timed_out: bool = False
    """Whether the kernel was killed since its time was up."""
    timeout: float | None = None
    stopping: bool = False
    """Whether the arm was asked to stop."""
    oom_kills: int = 0
    """Processes that the system ended for want of memory since the start."""


@dataclass(frozen=True)
class Outcome:
    """The arm's status, and a sentence for people."""

    status: str
    reason: str = ""
    traceback: str = ""


def judge(facts: Facts) -> Outcome:
    """The verdict on one attempt of an arm."""
    if facts.run_status == "ok":
        after = f"the notebook failed after the run: {_raised(facts)}" if facts.raised else \
            "the kernel ended after the run" if facts.kernel_code is not None and not facts.stopping else ""
        return Outcome("ok", after, facts.raised.get("traceback", ""))
    if facts.over:
        return Outcome("host_oom", facts.over)
    if facts.timed_out:
        return Outcome("timeout", f"no end after {facts.timeout:g} s; the kernel was killed")
    if facts.stopping:
        return Outcome("stopped", facts.run_detail or "stopped on request")
    if facts.run_status in FINAL:
        return Outcome(str(facts.run_status), facts.run_detail, facts.raised.get("traceback", ""))
    if facts.kernel_code is not None:
        return _judge_kernel(facts.kernel_code, facts.oom_kills)
    if facts.raised:
        status = "host_oom" if facts.raised["name"] == "MemoryError" else "error"
        return Outcome(status, _raised(facts), facts.raised["traceback"])
    if facts.run_status is not None:
        return Outcome("stopped", facts.run_detail or "stopped by somebody else")
    return Outcome("error", "the notebook ended without a run")


def _judge_kernel(code: int, oom_kills: int) -> Outcome:
    """A kernel that died: SIGKILL is want of memory only where the system says so."""
    if code == -signal.SIGKILL and oom_kills:
        return Outcome("host_oom", "the system ended the kernel (SIGKILL), out of host memory")
    if code in _CRASHES or code >= 0:
        return Outcome("error", f"the kernel: {how_it_ended(code)}")
    return Outcome("lost", f"the kernel was {how_it_ended(code)}")


def judge_program(code: int, words: str) -> Outcome:
    """The verdict on an attempt whose program has ended without one of its own: it failed before it could begin.

    `words`: what it wrote to its log.
    """
    if code in _REQUESTS:
        return Outcome("stopped", f"stopped before it began ({how_it_ended(code)})")
    if code < 0 and code not in _CRASHES:
        return Outcome("lost", f"the arm's program was {how_it_ended(code)}")
    last = next((line.strip() for line in reversed(words.splitlines()) if line.strip()), "")
    return Outcome("error", f"the arm's program: {how_it_ended(code)}" + (f"; its last words: {last}" if last else ""),
                   words)


def _raised(facts: Facts) -> str:
    first = facts.raised["message"].strip().splitlines()
    return f"{facts.raised['name']}: {first[0]}" if first else facts.raised["name"]
