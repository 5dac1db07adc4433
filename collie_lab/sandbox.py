"""Programs that a model has written, each in a process that can do nothing but compute.

A process of its own with an empty environment, in a session of its own, whose seccomp filter does not let it change a
file, connect, start another process or send a signal (`collie_lab._jail` says exactly what it may), with limits on
memory, time and output. It can read what the user can read. What it says of itself is believed only where it ran to
its end; that is enough against mistakes of a model, not against a program that is written to cheat its judge.
"""

from __future__ import annotations

import functools
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from collie_lab.machine import usable_cpus

__all__ = ["run", "run_all", "unavailable"]

_JAIL: Final = Path(__file__).with_name("_jail.py")


def run(program: str, *, seconds: float = 3.0, memory: int = 2**30) -> str:
    """Run a Python program: `passed`, `failed: <exception>`, `timeout`, or `died` where it took its process with it.

    It has `seconds` of wall-clock time (and a second of grace for the start) and `memory` bytes of address space.

    Raises:
        OSError: this machine has no sandbox; the program has not run.
    """
    token = secrets.token_hex(16)
    order = json.dumps({"program": program, "token": token, "memory": memory, "seconds": seconds})
    # -I: nothing of the user's environment; -S: the standard library alone.
    with tempfile.TemporaryFile() as output:  # a pipe would have no limit
        process = subprocess.Popen([sys.executable, "-I", "-S", str(_JAIL)], env={}, cwd="/", start_new_session=True,
                                   stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL)
        try:
            process.communicate(order.encode(), timeout=seconds + 1.0)
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            process.kill()
            process.communicate()
        output.seek(0)
        said = output.read().decode(errors="replace")
    word, _, outcome = said.rstrip("\n").rpartition("\n")[2].partition(" ")
    if not secrets.compare_digest(word, token):
        return "died"
    if outcome.startswith("no sandbox: "):
        raise OSError(outcome.removeprefix("no sandbox: "))
    return outcome


def run_all(programs: Sequence[str], *, seconds: float = 3.0, memory: int = 2**30, workers: int | None = None,
            tick: Callable[[], None] = lambda: None) -> list[str]:
    """The outcome of each program, several of them at a time (default: one a core). `tick` is called after each."""
    outcomes = []
    with ThreadPoolExecutor(workers or usable_cpus()) as pool:
        for outcome in pool.map(functools.partial(run, seconds=seconds, memory=memory), programs):
            outcomes.append(outcome)
            tick()
    return outcomes


@functools.cache
def unavailable() -> str:
    """Why this machine can shut no program in; empty where it can."""
    if sys.platform != "linux":
        return f"it takes Linux, and this is {sys.platform}"
    try:
        outcome = run("open('/dev/null', 'w')", seconds=10.0)
    except OSError as error:
        return str(error)
    return "" if outcome.startswith("failed: PermissionError") else f"a program that writes a file: {outcome}"
