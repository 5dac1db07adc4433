"""Checkpoints by `torch.distributed.checkpoint`: tensors only, whole or not there, no pickle trusted.

A checkpoint holds the trained weights, the optimizer's state by parameter name and every rank's random
state, and beside them a JSON file with the step. What is frozen is not kept: the model cell makes it again.
Weights that are not finite make no checkpoint: those before stay.
Names are those of the whole model, and tensors know their place in the whole: any layout reads what any other
wrote, and each rank reads the slices that it holds.
"""

from __future__ import annotations

import copy
import functools
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from collie_lab.folder import BEST, Board, best_checkpoints, checkpoints_in, write_json
from collie_lab.training._share import HostMemory, SharePlanner, choose_share
from collie_lab.training._state import model_state, optimizer_state, random_state, rank_and_world
from collie_lab.training.finite import is_finite
from collie_lab.training.memory import uncounted

__all__ = ["Checkpointer", "Written"]

_PARTIAL = ".step-*.partial"


@dataclass(frozen=True)
class Written:
    """A checkpoint that is complete.

    Attributes:
        step: the step after which it was taken.
        path: its folder.
        blocked: seconds for which the loop stood still: until a write before was over, and to copy the state.
    """

    step: int
    path: Path
    blocked: float


class _Plan(NamedTuple):
    """What is to become of a checkpoint that is being written."""

    path: Path
    state: dict[str, Any]
    finite: bool
    rolling: bool
    best: dict[str, Board]


class Checkpointer:
    """Writes checkpoints while the training goes on; made, and `save` called, on all ranks together.

    `save` copies the state to the host's memory and returns; a thread writes it to a hidden folder, with a process
    group of its own, so that nothing meets the collectives of the training. When all ranks have written, rank 0
    renames the folder and removes what is too old. There is one write at a time: a `save` waits for the one before.

    What the boards of `keep_best` name is kept, however old.

    Args:
        folder: where checkpoints go, as `step-000100`. What a killed run has left there half-written is removed.
        keep: how many checkpoints to keep.
        identity: what a run that resumes from one must share; it stands in `state.json`.
        layout: sizes of the parallel axes: random states are restored only under the same.
        on_written: called in the loop's thread (in `poll`, `save` or `finish`) for each checkpoint that is complete.
        on_refused: told there, in a sentence, of weights that are not finite.

    Raises:
        RuntimeError: from `save`, `poll` and `finish`: a write has failed. The checkpoints before it are whole.
    """

    def __init__(self, folder: Path, *, keep: int, identity: Mapping[str, Any] | None = None,
                 layout: Mapping[str, int] | None = None, on_written: Callable[[Written], None] | None = None,
                 on_refused: Callable[[str], None] | None = None):
        self._folder, self._keep, self._on_written, self._on_refused = folder, keep, on_written, on_refused
        self._rank, world = rank_and_world()
        self._header = {"world_size": world, "layout": dict(layout or {}), "identity": dict(identity or {})}
        self._group = _host_group(dist.group.WORLD) if world > 1 else None
        self._memory = HostMemory()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[Future[bool], Written] | None = None
        self._newest: int | None = None  # the step of the last one that was written here
        self._best: dict[str, Board] = {}
        best = {entry["path"] for board in best_checkpoints(folder).values() for entry in board}
        self._rolling = {path.name for path in checkpoints_in(folder)} - best
        if self._rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for partial in folder.glob(_PARTIAL):
                shutil.rmtree(partial, ignore_errors=True)
        if self._group is not None:
            dist.barrier(self._group)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, rolling: bool = True,
             extra: Mapping[str, Any] | None = None) -> None:
        """Begin to write `step-<step>`; the weights may change as soon as it returns.

        Without `rolling` it is kept for the boards of `keep_best` alone. `extra` goes to `state.json`.
        """
        began = time.perf_counter()
        self.finish()
        plan = _Plan(self._folder / f"step-{step:06d}", {"step": step, **self._header, **(extra or {})},
                     is_finite(model), rolling, copy.deepcopy(self._best))
        if step == self._newest:  # it is there: only what is kept, and why, may have changed
            if self._rank == 0:
                write_json(plan.path / "state.json", plan.state)
                self._settle(plan)
            return
        state = {**model_state(model), **optimizer_state(model, optimizer), **random_state(self._rank)}
        items = choose_share(state, self._group)
        copies = self._memory.copy({item.index.fqn: state[item.index.fqn] for item in items})
        written = Written(step, plan.path, time.perf_counter() - began)
        self._writing = self._thread.submit(self._write, plan, items, copies), written

    def keep_best(self, monitor: str, board: Board, *, tell: bool) -> None:
        """Have the next `save` keep what is on the board of a figure, and no longer what was on it.

        With `tell` all that it names is there already: `best.json` is written now.
        """
        self._best[monitor] = board
        if tell and self._rank == 0:
            write_json(self._folder / BEST, self._best)

    def poll(self) -> None:
        """Tell of a write that is over, or has failed; does not wait."""
        if self._writing is not None and self._writing[0].done():
            self.finish()

    def finish(self) -> None:
        """Wait for the write that is under way: its checkpoint is there when this returns."""
        if self._writing is None:
            return
        (write, written), self._writing = self._writing, None
        try:
            complete = write.result()
        except (Exception, CheckpointException) as error:
            cause = _cause(error)
            raise RuntimeError(f"the checkpoint of step {written.step} could not be written to {self._folder} "
                               f"({type(cause).__name__}: {cause}). Those before it are whole") from cause
        if complete:
            self._newest = written.step
        if complete and self._on_written is not None:
            self._on_written(written)
        if not complete and self._on_refused is not None:
            self._on_refused(f"weights are not finite after step {written.step}: they make no checkpoint")

    def close(self) -> None:
        """Let a write under way come to its end, whatever it is: the way out of a loop, failed or not."""
        self._thread.shutdown()

    # --- in the writer's thread -------------------------------------------------------------------

    def _write(self, plan: _Plan, items: list[WriteItem], copies: Mapping[str, Tensor]) -> bool:
        """Whether the weights were finite, and so written."""
        if not self._all_finite(plan.finite):
            return False
        partial = plan.path.with_name(f".{plan.path.name}.partial")
        with uncounted():
            save({}, storage_writer=FileSystemWriter(partial), planner=SharePlanner(items, copies),
                 process_group=self._group, no_dist=self._group is None)
        outcome: list[Exception | None] = [None]
        if self._rank == 0:  # all ranks have written: torch has told it so
            try:
                write_json(partial / "state.json", plan.state)
                self._commit(partial, plan)
            except OSError as error:
                outcome[0] = error
        if self._group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise outcome[0]
        return True

    def _all_finite(self, finite: bool) -> bool:
        """Whether the weights of all ranks are finite."""
        if self._group is None:
            return finite
        everyone = torch.tensor(int(finite))
        dist.all_reduce(everyone, dist.ReduceOp.MIN, group=self._group)
        return bool(everyone)

    def _commit(self, partial: Path, plan: _Plan) -> None:
        """The whole folder gets its name. A folder to be removed loses its name first."""
        if plan.path.exists():  # written before, by the run that this one resumed
            _remove(plan.path)
        partial.rename(plan.path)
        self._settle(plan)

    def _settle(self, plan: _Plan) -> None:
        """Tell what a checkpoint that has its name is kept for; those that nobody wants any longer go."""
        if plan.best:
            write_json(self._folder / BEST, plan.best)
        there = checkpoints_in(self._folder)
        if plan.rolling:  # the newest by time, too: a run that was resumed further back keeps what it writes
            others = [path.name for path in there if path.name in self._rolling - {plan.path.name}]
            self._rolling = {plan.path.name, *others[max(0, len(others) - self._keep + 1):]}
        wanted = self._rolling | {entry["path"] for board in plan.best.values() for entry in board}
        for path in there:
            if path.name not in wanted:
                _remove(path)


# --- small things -----------------------------------------------------------------------------------


def _cause(error: BaseException) -> BaseException:
    """What went wrong on a rank, out of torch's account of all ranks."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


def _remove(path: Path) -> None:
    """Killed in the middle, it leaves no folder that looks like a checkpoint; nor does what cannot be deleted yet, for
    somebody has it open on a file server."""
    hidden = path.with_name(f".{path.name}.old.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


@functools.cache
def _host_group(_world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """All ranks, for messages between their hosts; one for all runs of a pool."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group
