"""What Slurm says of its jobs and partitions, asked by its own programs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

__all__ = ["Job", "Partition", "cancel", "ending", "jobs", "minutes", "partitions", "past_state"]

#: States after which a job does not go on, or only as another; "": Slurm knows it no longer.
_ENDED: Final = frozenset({
    "", "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
    "REVOKED", "TIMEOUT"})

#: States in which a job has no node yet, or none any more until its next turn.
_WAITING: Final = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})

#: Seconds that one of Slurm's programs gets to answer.
_PATIENCE: Final = 60

#: What slurmstepd writes to the log of a job that it ended for its memory, where the state does not tell.
_MEMORY_WORDS: Final = re.compile(r"slurmstepd\S*: error:.*(exceeded memory limit|oom.kill)", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """One job, or one task of an array."""

    id: str
    """`7`, or `7_2`."""
    name: str
    state: str
    """One of Slurm's: `PENDING`, `RUNNING`, `OUT_OF_MEMORY`, ...; "" where it knows the job no longer."""
    reason: str
    """Why it waits or has failed, in Slurm's words; `None` where it has nothing to say."""

    @property
    def alive(self) -> bool:
        """Whether it waits, runs, or is about to be queued again."""
        return self.state not in _ENDED

    @property
    def waits(self) -> bool:
        """Whether it has no node yet."""
        return self.state in _WAITING

    @property
    def number(self) -> int:
        """Of the array; the larger, the newer."""
        return int(self.id.partition("_")[0])

    @property
    def index(self) -> int:
        """Its place in the array; 0 where it is none."""
        return int(self.id.partition("_")[2] or 0)


@dataclass(frozen=True)
class Partition:
    """What a partition has to give to one job on one node."""

    name: str
    gpus: int
    """Of the node that has the most."""
    cpus: int
    default_minutes: float | None
    max_minutes: float | None
    """None: without limit."""


def jobs(names: Iterable[str]) -> list[Job]:
    """The jobs of these names that Slurm remembers; those that ended long ago (`MinJobAge`) it does not.

    Raises:
        OSError: Slurm does not answer.
    """
    if not (asked := ",".join(names)):
        return []
    lines = _ask("squeue", "-h", "-r", "-t", "all", f"--name={asked}", "-o", "%i|%j|%T|%r").splitlines()
    return [Job(*line.split("|", 3)) for line in lines]


def past_state(id: str) -> str:
    """The state of a job that `squeue` has forgotten, by `sacct`; empty where there is no accounting."""
    try:
        lines = _ask("sacct", "-n", "-X", "-P", "-j", id, "-o", "State").split("\n")
    except OSError:
        return ""
    return lines[-1].partition(" ")[0]  # `CANCELLED by 1000`; the last line is that of the last time it ran


def partitions() -> list[Partition]:
    """Every partition that one may see, the cluster's default one first.

    Raises:
        OSError: there is no Slurm here, or it does not answer.
    """
    found: dict[str, Partition] = {}
    lines = _ask("sinfo", "-h", "-o", "%P|%G|%c|%L|%l").splitlines()  # one for each kind of node in a partition
    for line in sorted(lines, key=lambda line: not line.partition("|")[0].endswith("*")):
        title, resources, cpus, default, longest = line.split("|")
        name = title.rstrip("*")
        other = found.get(name, Partition(name, 0, 0, minutes(default), minutes(longest)))
        found[name] = replace(other, gpus=max(other.gpus, _gpus(resources)),
                              cpus=max(other.cpus, int(cpus.rstrip("+"))))
    return list(found.values())


def cancel(id: str, *options: str) -> None:
    """End a job, or send it a signal; nothing where it has ended meanwhile."""
    subprocess.run(["scancel", "--quiet", *options, id], timeout=_PATIENCE, check=False)


def minutes(time: str) -> float | None:
    """Slurm's ways to write a time, in minutes: `90`, `90:00`, `1:30:00`, `2-12`, `2-12:30`; None for `infinite`.

    Raises:
        ValueError: it is none of these.
    """
    if time.lower() in ("infinite", "unlimited", "n/a"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time.strip())
    if match is None:
        raise ValueError(f"no time of Slurm: {time!r}; e.g. 2:00:00 (hours) or 1-12 (a day and 12 hours)")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:
        hours, minute, second = (*numbers, 0, 0)[:3]
        return int(days) * 1440 + hours * 60 + minute + second / 60
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1] + numbers[2] / 60
    return numbers[0] + (numbers[1] / 60 if len(numbers) == 2 else 0)


def ending(state: str, log: str) -> tuple[str, str]:
    """The status of an arm that Slurm ended before it could write its own, and a sentence why.

    `log`: what the job has written, slurmstepd's words among it.
    """
    if state == "OUT_OF_MEMORY" or _MEMORY_WORDS.search(log):
        return "host_oom", "Slurm ended the job: it took more memory than it had asked for"
    if state in ("TIMEOUT", "DEADLINE"):
        return "timeout", "Slurm ended the job at its time limit"
    if state == "CANCELLED":
        return "stopped", "the job was cancelled"
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "nothing")
    how = state or "Slurm has forgotten how"
    return "lost", f"the job ended ({how}), the arm without a word; the job's last: {last}"


def _gpus(resources: str) -> int:
    """GPUs in a list of generic resources: `gpu:8`, `gpu:h100:8(S:0-1),nvme:2`."""
    return sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", resources))


def _ask(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not answer within {_PATIENCE} s") from None
    if answer.returncode:
        raise OSError(f"{command[0]}: {answer.stderr.strip()}")
    return answer.stdout.strip()
