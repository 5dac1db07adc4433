"""A dry run: the step that a rank would run, on tensors without values, with every byte counted.

No data, no weights and no other ranks are needed: the documents of a batch are of full length, parameters are fake
tensors, and collectives are those of a process group that only pretends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_iter

from collie_lab.cells import Experiment
from collie_lab.data import Documents, Order
from collie_lab.data.order import Step
from collie_lab.optim import RuleOptimizer
from collie_lab.parallel import build_strategy
from collie_lab.planning._ledger import Event, Ledger
from collie_lab.planning._patches import patched
from collie_lab.planning._roles import Role
from collie_lab.planning._work import Work
from collie_lab.planning.plan import GRANULE
from collie_lab.training.step import TrainingStep

__all__ = ["Trace", "dry_run", "full_documents"]


@dataclass(frozen=True)
class Trace:
    """What happened to a rank's memory.

    Attributes:
        events: sizes of storages, in order, from the first weight on.
        roles: what each storage was for.
        steps: where in `events` each step begins.
        updates: where in each the optimizer's step begins; in backward, its end.
        work: what the last step computes, moves and sends.
        flops: of the whole model's step, as MFU counts them: a token's, and those of a pair of tokens.
        moments: where in `events` a moment of a step begins, and its name.
    """

    events: list[Event]
    roles: dict[int, Role]
    steps: list[int]
    updates: list[int]
    work: Work
    flops: tuple[int, int]
    moments: list[tuple[int, str]]


def dry_run(experiment: Experiment, documents: Documents, *, rank: int = 0, steps: int = 2, on_gpu: bool = False,
            padded: bool = False) -> Trace:
    """The memory of `rank` over the first steps on these documents.

    Args:
        documents: their lengths alone matter.
        steps: the first makes what the optimizer keeps; from the second on they are alike.
            Of a step's micro-batches three run, where there is no pipeline: the first, the second, to which all others
            but the last are alike and whose work counts for theirs, and the last.
        on_gpu: as a GPU's allocator counts: not what lies in the host's memory, and the rest in its granules.
        padded: documents may differ in length, though these do not.
    """
    training, parallel, device = experiment.training, experiment.parallel, torch.device("cpu")
    ledger, begins, updates = Ledger(GRANULE if on_gpu else 1), [], []
    with _pretended_ranks(rank, parallel.world_size):
        strategy = build_strategy(parallel, device, training.precision)
        rows = parallel.micro_batch_size(training.batch_size, training.micro_batch_size)
        order = Order(documents, batch_size=training.batch_size, shuffle=False, dp_rank=strategy.place.dp,
                      dp_size=parallel.dp, micro_batch_size=rows)
        # A row alone is full, unless stages want all micro-batches as wide, or it holds documents that get rows each.
        padded = padded and (rows > 1 or parallel.pp > 1 or experiment.data.packing)
        # Of a CPU: fake tensors of a GPU fail without one.
        with patched(FakeTensorMode(allow_non_fake_inputs=True), ledger, padded=padded):
            whole = next(order.steps())
            plan = whole if parallel.pp > 1 else _without_alike(whole)
            step = TrainingStep(experiment, device, strategy, say=_counter(ledger.work, whole, plan))
            for number in range(1, steps + 1):
                if on_gpu or isinstance(step.optimizer, RuleOptimizer):
                    _leave_out_counts(ledger, step.optimizer)
                begins.append(len(ledger.events))
                ledger.work.begin(counts=number == steps)
                ledger.begin("embedding")
                with ledger.as_role("activations"):
                    step.measure(documents, plan)
                    step.forward_backward(documents, plan)
                updates.append(len(ledger.events))
                ledger.work.phase = "optimizer"
                ledger.begin("update")
                step.update(number)
                ledger.work.phase = "hessian"
                with ledger.as_role("activations"):
                    step.refresh_hessian(documents, plan, number)
            events = list(ledger.events)  # not what taking it all apart adds
    flops = step.built.flops
    return Trace(events, ledger.roles, begins, updates, ledger.work, (flops.per_token, flops.per_attended),
                 ledger.moments)


def _without_alike(step: Step) -> Step:
    """The step with no more than the first, the second and the last micro-batch."""
    batches = step.micro_batches
    return step if len(batches) < 4 else replace(step, micro_batches=(*batches[:2], batches[-1]))


def _counter(work: Work, whole: Step, run: Step) -> Callable[..., None]:
    """What is told of every micro-batch that runs: in each pass over them the second stands for those left out."""
    alike = 1 + len(whole.micro_batches) - len(run.micro_batches)
    turns = itertools.cycle(range(len(run.micro_batches)))

    def begin(**_: object) -> None:
        work.stands_for = alike if next(turns) == 1 else 1

    return begin


def _leave_out_counts(ledger: Ledger, optimizer: torch.optim.Optimizer) -> None:
    """Counts of steps stay in the host's memory, also those of torch's own optimizers; ours are not even torch's."""
    for value in tree_iter(list(optimizer.state.values())):
        if isinstance(value, Tensor) and not value.ndim:
            ledger.ignore(value)


def full_documents(count: int, length: int) -> Documents:
    """`count` documents of `length` tokens each, all of which but the first are learned."""
    learned = np.tile(np.arange(length) > 0, count)
    return Documents(np.zeros(count * length, dtype=np.int32), learned, np.arange(count + 1) * length,
                     np.zeros(0, dtype=np.int64))


@contextmanager
def _pretended_ranks(rank: int, world_size: int) -> Iterator[None]:
    """A process group of which only this rank is there."""
    if world_size == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
