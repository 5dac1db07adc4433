"""What every rank does before anything else: die with its parent, write to its logs, tell how it failed.

Imports no torch, so that a failure while torch is imported is told like any other.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil

from collie_lab.beat import memory, read_beats
from collie_lab.folder import RunFolder

__all__ = ["SUPERVISOR", "account", "die_with_parent", "enter", "leave", "lend", "lend_output"]

#: The variable by which a supervisor tells its ranks its pid.
SUPERVISOR = "COLLIE_LAB_SUPERVISOR"

_PR_SET_PDEATHSIG = 1
#: Seconds that threads get to end, once the work is done.
_PATIENCE = 600.0


@contextlib.contextmanager
def enter(folder: RunFolder | str | Path) -> Iterator[None]:
    """The frame of a rank's whole life: `with rank.enter(folder): train(...)`.

    Standard output and error go to the rank's logs; SIGUSR1 writes the stacks of all threads to the
    error log; SIGINT is ignored (a run is stopped by its stop flag). An exception leaves a record in
    `errors/` and ends the process with exit code 1. The rank's number is the environment's `RANK`.
    """
    folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    rank = int(os.environ.get("RANK", "0"))
    _redirect(folder, rank)
    _tie_to_parent()
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _answering(folder, rank):
        yield


@contextlib.contextmanager
def lend(folder: RunFolder) -> Iterator[None]:
    """Within it, a rank that has entered works for another folder: its logs and errors are there."""
    rank = int(os.environ.get("RANK", "0"))
    with lend_output(folder.log(rank, "out"), folder.log(rank, "err")), _answering(folder, rank):
        yield


@contextlib.contextmanager
def lend_output(out: Path, err: Path) -> Iterator[None]:
    """Within it, standard output and error go to these files."""
    sys.stdout.flush()
    sys.stderr.flush()
    own = os.dup(1), os.dup(2)
    for descriptor, path in ((1, out), (2, err)):
        _send(descriptor, path)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in zip((1, 2), own, strict=True):
            os.dup2(before, descriptor)
            os.close(before)


@contextlib.contextmanager
def _answering(folder: RunFolder, rank: int) -> Iterator[None]:
    """Whatever is raised within it is recorded in the folder, and ends the process."""
    try:
        yield
    except SystemExit as leave:
        # 0 is no failure, and what was recorded within is not told again.
        if leave.code not in (None, 0) and not isinstance(leave, _RecordedError):
            _record(folder, rank, leave)
        raise
    except BaseException as error:
        _record(folder, rank, error)
        raise _RecordedError(1) from None


class _RecordedError(SystemExit):
    """The way out of a rank that has told of its failure."""


def leave() -> None:
    """End this process, whose work is done, with code 0 and without taking its libraries apart.

    Gloo's threads now and then abort in their destructors, and a finished run would count as failed. What Python
    promises at its end is kept: threads end, exit handlers run, output is written.
    """
    patience = threading.Timer(_PATIENCE, _leave_threads)
    patience.daemon = True
    patience.start()
    # As the interpreter does it: pools are told to end, threads are joined.
    threading._shutdown()  # type: ignore[attr-defined]
    patience.cancel()
    _exit()


def _leave_threads() -> None:
    names = [thread.name for thread in threading.enumerate()
             if not thread.daemon and thread is not threading.main_thread()]
    print(f"the work is done, but threads go on: {', '.join(names)}. They are left; daemon=True lets a process end",
          file=sys.stderr)
    _exit()


def _exit() -> NoReturn:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def die_with_parent() -> None:
    """Have Linux send SIGKILL to this process when the thread that started it ends; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _redirect(folder: RunFolder, rank: int) -> None:
    """Files, not pipes: whoever floods a file blocks nobody and nobody has to read it."""
    for descriptor, stream in ((1, "out"), (2, "err")):
        _send(descriptor, folder.log(rank, stream))


def _send(descriptor: int, path: Path) -> None:
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, descriptor)
    os.close(target)


def _tie_to_parent() -> None:
    """End when torchrun ends, however it ends, and have forked children (DataLoader workers) do the same."""
    die_with_parent()
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor is not None and not _has_grandparent(int(supervisor)):
        # torchrun was gone before the line above could notice.
        print("this rank has lost the launcher that started it", file=sys.stderr)
        os._exit(1)
    if sys.platform == "linux":
        _tie_children()
    else:
        threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()


def _has_grandparent(pid: int) -> bool:
    try:
        return psutil.Process(os.getppid()).ppid() == pid
    except psutil.NoSuchProcess:
        return False


def _tie_children() -> None:
    """Tie every forked child to its parent: the kernel's setting does not pass through a fork.

    Only children of the main thread: the signal comes when the forking *thread* ends, and another
    thread may well end before the child has done its work.
    """
    forking = threading.local()

    def before() -> None:
        forking.parent = os.getpid()
        forking.main = threading.current_thread() is threading.main_thread()

    def in_child() -> None:
        if forking.main:
            die_with_parent()
            if os.getppid() != forking.parent:
                os._exit(1)

    os.register_at_fork(before=before, after_in_child=in_child)


def _follow_parent(parent: int) -> None:
    """Where the system offers no signal at the parent's end: look once a second."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _record(folder: RunFolder, rank: int, error: BaseException) -> None:
    """Write `errors/rank-N.json`, and the traceback to the error log."""
    time_ns = time.time_ns()
    told = account(error, __file__)
    if isinstance(error, SystemExit):
        told["message"] = f"sys.exit({error.code!r})"
    where = read_beats(folder).get(rank, {})
    folder.insist(f"errors/rank-{rank}.json", {
        "rank": rank, "time_ns": time_ns, "host": socket.gethostname(), **told,
        **{name: where.get(name) for name in ("step", "doing", "shape")}, **memory(),
    })
    print(told["traceback"], file=sys.stderr, end="", flush=True)


def account(error: BaseException, module: str) -> dict[str, str]:
    """`type`, `message` and `traceback` of an exception, without the first frames, which are those of a module's file.
    """
    inner = error.__traceback__
    while inner is not None and inner.tb_frame.f_code.co_filename == module:
        inner = inner.tb_next
    try:
        message = str(error)
    except Exception as failure:  # an exception of somebody's own
        message = f"(its text cannot be told: {type(failure).__name__} in {type(error).__name__}.__str__)"
    text = "".join(traceback.format_exception(type(error), error, inner))
    return {"type": type(error).__name__, "message": _shortened(message, 2_000), "traceback": _shortened(text, 20_000)}


def _shortened(text: str, most: int) -> str:
    """Both ends of a long text."""
    if len(text) <= most:
        return text
    return f"{text[:most // 2]} [... {len(text) - most:,} characters ...] {text[-most // 2:]}"
