"""What became of a run, judged from what is left of it. Pure: facts in, verdict out."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from collie_lab.launch._agent import Exit

__all__ = ["Cause", "Facts", "Report", "Verdict", "first_failure", "how_it_ended", "judge", "summary_line"]

#: Why a supervisor stopped waiting: the ranks had ended, one had failed, one no longer moved, somebody wanted the end,
#: the ranks did not heed the stop flag, the time was up, or the kernel (for node 1 and on: node 0) was gone. With
#: several nodes also: some did not come, or node 0 wants the end.
Cause = Literal["ended", "failed", "stalled", "killed", "unstopped", "timeout", "orphaned", "absent", "dismissed"]


@dataclass(frozen=True)
class Report:
    """How one node's part of a run ended."""

    cause: Cause
    agent_code: int | None
    """Exit code of its torchrun; None where it was not started, or could not be ended."""
    exits: Sequence[Exit] = ()
    """Its ranks that did not end with code 0, torchrun's first suspect first."""
    signalled: Sequence[int] = ()
    """Of these, the ranks that the supervisor itself ended."""
    oom_kills: int = 0
    """Processes that the system ended for want of memory since the start."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict` and JSON."""
        return cls(**{**fields, "exits": [Exit(*exit_) for exit_ in fields["exits"]]})


@dataclass(frozen=True)
class Facts:
    """What the supervisor knows at the end of a run, of all its nodes."""

    cause: Cause
    agent_code: int | None
    """Exit code of torchrun, of a node where it is not 0 if there is one; None where it could not be ended."""
    exits: Sequence[Exit] = ()
    """The ranks that did not end with code 0, torchrun's first suspect first."""
    records: Sequence[Mapping[str, Any]] = ()
    """The contents of `errors/`."""
    result: Mapping[str, Any] = field(default_factory=dict)
    signalled: frozenset[int] = frozenset()
    """Ranks that the supervisors themselves ended."""
    oom_kills: int = 0
    """Processes that the system ended for want of memory since the start."""
    beats: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """The last sign of life of every rank."""
    suspects: Sequence[int] = ()
    """Of ranks that no longer move, those for which the others wait; none where none stands out."""
    grace: float = 0.0
    timeout: float | None = None
    stall_timeout: float | None = None
    absent: Sequence[str] = ()
    """A sentence on every node that did not come, or was lost on the way."""
    log: str = "launcher.log"
    """Where torchrun's words are, of a node where it failed if there is one."""


@dataclass(frozen=True)
class Verdict:
    """The final status, the rank that failed first (if one did), and a sentence for people."""

    status: str
    detail: str = ""
    rank: int | None = None
    peak_bytes: int | None = None
    """Where memory ran out: how much there was in use."""
    shape: tuple[int, int] | None = None
    """Where memory ran out: rows and columns of the micro-batch at hand."""


def judge(facts: Facts) -> Verdict:
    """The verdict on a run."""
    if facts.agent_code == 0 and facts.result:
        return Verdict(str(facts.result["status"]), str(facts.result.get("detail", "")))
    match facts.cause:
        case "killed":
            return Verdict("stopped", "killed on request")
        case "unstopped":
            return Verdict("stopped", f"killed: the ranks did not heed the stop within {facts.grace:g} s")
        case "orphaned":
            return Verdict("stopped", "ended, for the kernel that had started it was gone")
        case "timeout":
            return Verdict("timeout", f"no end after {facts.timeout:g} s; "
                                      "`run.stacks()` shows what the ranks were doing")
        case "stalled":
            return _judge_stall(facts)
        case "absent":
            return Verdict("timeout", "; ".join(facts.absent))
    return _judge_failure(facts)


def _judge_failure(facts: Facts) -> Verdict:
    if facts.absent:  # the other nodes' ranks fail when the messages of a lost one stay away
        return Verdict("error", "; ".join(facts.absent))
    rank = first_failure(facts)
    if rank is None:
        return Verdict("error", _without_culprit(facts.agent_code, facts.log))
    record = next((record for record in facts.records if record["rank"] == rank), None)
    for told in facts.records:
        if (short := _out_of(told)) is not None:
            return _out_of_memory(short, told, told["rank"])
    if record is None and facts.oom_kills and _code(facts, rank) == -signal.SIGKILL:
        return _out_of_memory("host_oom", facts.beats.get(rank, {}), rank, "killed (SIGKILL) by the system, ")
    ending = summary_line(record) if record else how_it_ended(_code(facts, rank))
    return Verdict("error", f"rank {rank}: {ending}", rank)


def _out_of(record: Mapping[str, Any]) -> Literal["cuda_oom", "host_oom"] | None:
    """Which memory an error was for want of, if it was: a rank on a GPU also runs out of the host's."""
    kind, message = record["type"], record["message"]
    # torch has an exception of its own for its allocator alone, not for the driver and the libraries.
    if kind == "OutOfMemoryError" or "CUDA error: out of memory" in message or "ALLOC_FAILED" in message:
        return "cuda_oom"
    return "host_oom" if kind == "MemoryError" or "DefaultCPUAllocator" in message else None


def _out_of_memory(status: Literal["cuda_oom", "host_oom"], where: Mapping[str, Any], rank: int,
                   how: str = "") -> Verdict:
    """`where`: an error record, or a beat."""
    on_gpu = status == "cuda_oom"
    words = f"rank {rank}: {how}out of {'GPU' if on_gpu else 'host'} memory"
    if where.get("step"):
        words += f" in step {where['step']:,}"
    if (shape := where.get("shape")) is not None:
        words += f", with a micro-batch of {shape[0]:,} × {shape[1]:,} tokens"
    peak = where.get("memory") if where.get("on_gpu", False) == on_gpu else None  # else it is the other memory's
    if peak is not None:
        words += f"; it held {peak / 1e9:.2f} GB"
        if where.get("memory_limit"):
            words += f" of {where['memory_limit'] / 1e9:.2f} GB"
    return Verdict(status, words, rank, peak, tuple(shape) if shape is not None else None)


def _judge_stall(facts: Facts) -> Verdict:
    ranks = sorted(facts.suspects)
    silence = f"no sign of life for {facts.stall_timeout:g} s"
    if not ranks:
        return Verdict("timeout", f"{silence}: the ranks wait for each other; `run.stacks()` shows where")
    beat = facts.beats[ranks[0]]
    doing = "" if beat["doing"] == "step" else f" ({beat['doing']})"
    name = "rank " + str(ranks[0]) if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
    return Verdict("timeout", f"{name} stalled in step {beat['step']:,}{doing}: {silence}; `run.stacks()` shows where",
                   ranks[0])


def first_failure(facts: Facts) -> int | None:
    """The rank whose failure came first.

    A rank that ended without a word (a crash, `os._exit`) goes before those with an exception, whose
    exceptions are of its making. Not so SIGABRT: NCCL's watchdog aborts a rank after a peer has failed.
    SIGTERM is torchrun's way to end the peers.
    """
    told = sorted(facts.records, key=lambda record: int(record["time_ns"]))
    spoken = {record["rank"] for record in told}
    silent = [exit_ for exit_ in facts.exits if exit_.rank not in spoken and exit_.rank not in facts.signalled]
    crashed = [exit_.rank for exit_ in silent if exit_.code not in (-signal.SIGTERM, -signal.SIGABRT)]
    ordered = [*crashed, *(int(record["rank"]) for record in told), *(exit_.rank for exit_ in silent)]
    return ordered[0] if ordered else None


def how_it_ended(code: int) -> str:
    """An exit code in words: `segmentation fault (SIGSEGV)`, `exit code 3`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    words = {"SIGSEGV": "segmentation fault", "SIGKILL": "killed", "SIGABRT": "aborted", "SIGBUS": "bus error"}
    return f"{words.get(name, 'ended')} ({name})"


def summary_line(record: Mapping[str, Any]) -> str:
    """An error record in one line: `ValueError: bad loss`, `sys.exit(3)`."""
    message = str(record["message"]).strip()
    first = message.splitlines()[0] if message else ""
    if record["type"] == "SystemExit":
        return first
    return f"{record['type']}: {first}" if first else str(record["type"])


def _code(facts: Facts, rank: int) -> int:
    return next((exit_.code for exit_ in facts.exits if exit_.rank == rank), 1)


def _without_culprit(agent_code: int | None, log: str) -> str:
    if agent_code == 0:
        return "the ranks ended without a result"
    if agent_code is not None and agent_code < 0:
        return f"the launcher (torchrun) was {how_it_ended(agent_code)}"
    return f"the launcher (torchrun) failed; its words are in logs/{log}"
