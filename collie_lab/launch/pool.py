"""Warm ranks: processes that have torch and their process group, and wait for runs and for cells of the notebook."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import cloudpickle

from collie_lab.cells import CellError, Problem
from collie_lab.commands import Commands
from collie_lab.folder import RunFolder
from collie_lab.launch import _processes
from collie_lab.launch._relay import Relay
from collie_lab.launch._supervise import environment, module_paths, start_supervisor
from collie_lab.launch.errors import cell_error, rank_error

__all__ = ["Pool", "latest", "pull"]

_POLL: Final = 0.01

#: Seconds that ranks which an interrupt does not reach get before they are ended.
_DEAF: Final = 1.0

#: Seconds within which a supervisor whose ranks fail has ended them all.
_HOPELESS: Final = 30.0

_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


class Pool:
    """`nproc` ranks on this machine that stay between runs.

    `exp.launch(pool=pool)` starts its first step at once: torch is there, and the process group. `pool.run(code)`, and
    `%%ranks` in a notebook, execute code on every rank. The ranks end with `close()`, with the `with` block, or with
    this process. They also end when a run in them fails or is killed, since what it leaves behind is not to be trusted;
    the next use starts new ones. `env` adds to their environment.
    """

    def __init__(self, nproc: int, *, env: Mapping[str, str] | None = None, grace: float = 3.0):
        if not isinstance(nproc, int) or nproc < 1:
            raise CellError([Problem("Pool", "nproc", f"{nproc!r:.60} is no number of ranks", "1 or more")])
        self.nproc, self._env, self._grace = nproc, dict(env or {}), grace
        self._start()
        _pools.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "ended" if not self.alive else "busy" if self.busy else "waiting"
        return f"<Pool of {self.nproc}: {state}>"

    @property
    def alive(self) -> bool:
        """Whether its processes have not ended."""
        return self._process.poll() is None

    @property
    def busy(self) -> bool:
        """Whether its ranks have something to do."""
        return self.alive and len(self._commands.outcomes(self._index, self.nproc)) < (self.nproc if self._index else 0)

    # --- code

    def run(self, code: str) -> None:
        """Execute code on every rank, in names of their own that last; print what they print, behind their number.

        There are `rank`, `world_size`, `device`, `torch` and `dist` (torch.distributed) to begin with. Raises
        `RankError` with the rank whose exception came first; ranks that then wait for it in vain are ended with all
        others, after `grace` seconds.
        """
        self._do({"kind": "cell", "code": code})

    def push(self, **values: Any) -> None:
        """Give every rank values under these names."""
        self._do({"kind": "push"}, cloudpickle.dumps(values))

    def pull(self, name: str, rank: int | None = 0) -> Any:
        """The value of a name, or an expression, on a rank; on all of them, as a list, with `rank=None`.

        Tensors come to the CPU, sharded ones whole.
        """
        if rank is not None and not 0 <= rank < self.nproc:
            raise CellError([Problem("Pool", "rank", f"there is no rank {rank}", f"they are 0 to {self.nproc - 1}")])
        ranks = list(range(self.nproc)) if rank is None else [rank]
        place = self._do({"kind": "pull", "name": name, "ranks": ranks})
        values = [pickle.loads((place / f"rank-{number}.pkl").read_bytes()) for number in ranks]
        shutil.rmtree(place)
        return values if rank is None else values[0]

    # --- runs

    def check(self, world_size: int) -> None:
        """Raise `CellError` where a run of so many ranks cannot begin here now."""
        if world_size != self.nproc:
            raise CellError([Problem("Parallel", "dp", f"the layout has {world_size} ranks, the pool {self.nproc}",
                                     f"launch it without the pool, or make a Pool({world_size})")])
        self._check_idle()

    def begin(self, run: RunFolder) -> None:
        """Give the ranks a run; its folder is written."""
        self._wake()
        run.write("status.json", {"status": "running", **_processes.identity(self._process.pid),
                                  "started": time.time(), "ended": None, "pooled": True})
        self._give({"kind": "run", "folder": str(run.path)})

    # --- life

    def close(self) -> None:
        """End the ranks, and whatever runs in them."""
        self._finalize()

    def _start(self) -> None:
        parent = Path(tempfile.mkdtemp(prefix="collie-pool-"))  # of mode 0700
        paths = module_paths()
        try:
            folder = RunFolder.create(parent, "pool")
            folder.write("launch.json", {
                "world_size": self.nproc, "grace": self._grace, "timeout": None, "stall_timeout": None,
                "kernel_pid": os.getpid(), "module": "collie_lab.training.warm", "nodes": None, "parent": str(parent),
            })
            self._process = start_supervisor(folder, "pool", {**environment(self.nproc, paths), **self._env})
        except BaseException:
            shutil.rmtree(parent)
            raise
        self._folder, self._commands, self._index = folder, Commands(folder), 0
        self._finalize = weakref.finalize(self, _end, self._process, parent)

    def _wake(self) -> None:
        """New ranks, where the old ones are gone."""
        if not self.alive:
            self._finalize()
            self._start()

    def _check_idle(self) -> None:
        if self.busy:
            raise CellError([Problem("Pool", "", "its ranks are still busy with what they were given before",
                                     "wait for it (`run.wait()`), or `run.stop()` it")])

    def _give(self, command: Mapping[str, Any]) -> int:
        self._index += 1
        self._commands.give(self._index, command)
        return self._index

    def _do(self, command: Mapping[str, Any], values: bytes = b"") -> Path:
        """Have all ranks do something other than a run, and wait for it; the folder of what they wrote."""
        self._check_idle()
        self._wake()
        place = self._commands.place(self._index + 1)
        place.mkdir(parents=True)
        if values:
            (place / "values.pkl").write_bytes(values)
        index, relay = self._give(command), Relay(place, self.nproc)
        try:
            self._await(index, relay)
        except KeyboardInterrupt:
            self._interrupt(index, relay, "interrupted")
            raise
        finally:
            relay.flush()
        outcomes = self._commands.outcomes(index, self.nproc)
        if any(outcomes.values()):
            raise cell_error(outcomes)
        return place

    def _await(self, index: int, relay: Relay) -> None:
        """Return when all ranks are done; see to it that they end soon where one has failed."""
        failed_at: float | None = None
        while len(outcomes := self._commands.outcomes(index, self.nproc)) < self.nproc:
            relay.pass_on()
            if not self.alive:
                raise rank_error(self._folder, "error")
            if failed_at is None and any(outcomes.values()):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + self._grace:
                self._interrupt(index, relay, "another rank has failed")
                return
            time.sleep(_POLL)

    def _interrupt(self, index: int, relay: Relay, why: str) -> None:
        """Interrupt the ranks that are not done; end all where that does not reach one: it is in a collective, say."""
        pids = _processes.ranks(self._process.pid)
        late = [rank for rank in range(self.nproc) if not self._commands.done(index, rank).exists()]
        if not pids.keys() >= set(late):  # one is gone: its supervisor is about to say how
            self._process.wait(timeout=_HOPELESS)
            raise rank_error(self._folder, "error")
        for rank in late:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[rank], signal.SIGINT)
        deadline = time.monotonic() + _DEAF
        while len(outcomes := self._commands.outcomes(index, self.nproc)) < self.nproc:
            if time.monotonic() > deadline or not self.alive:
                self._process.terminate()
                self._process.wait()
                relay.flush()
                deaf = sorted(set(range(self.nproc)) - set(outcomes))
                raise cell_error(outcomes, deaf, why)
            time.sleep(_POLL)


def latest() -> Pool:
    """The pool that was made last and is still in use; where there is none, `CellError`."""
    pools = sorted(_pools, key=lambda pool: pool._folder.path.parent.stat().st_mtime if pool.alive else 0.0)
    if not pools:
        raise CellError([Problem("Pool", "", "there is none", "make one: `pool = lab.Pool(2)`, or `%%ranks -n 2`")])
    return pools[-1]


def pull(name: str, rank: int | None = 0) -> Any:
    """The value of a name on a rank of the latest pool: `Pool.pull`."""
    return latest().pull(name, rank)


def _end(process: subprocess.Popen[bytes], parent: Path) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15.0)
        if process.poll() is None:
            process.kill()  # with its end the system ends all below it
            process.wait()
    shutil.rmtree(parent, ignore_errors=True)
