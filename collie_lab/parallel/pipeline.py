"""Pipeline parallelism: consecutive layers on different ranks, for any causal LM with a pipeline plan.

Layers are cut into *runs*, one or two of them on a rank. Training follows a schedule of
`torch.distributed.pipelining`; called outside of it, the model works in *relay*: hidden states go through all runs in
order, logits go back to all ranks, so that evaluation and generation are those of one process.

Shapes: B batch (1 where documents are packed), T tokens of a row, C hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from typing_extensions import override

from collie_lab.cells.parallel import Schedule, check_micro_batches
from collie_lab.parallel.deferred import DeferredLinears
from collie_lab.parallel.stages import Parts, Skip, cut
from collie_lab.parallel.tensor import TensorParallel

__all__ = ["Pipeline", "loss_rank"]

Batch = dict[str, Any]

_CLASSES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B,
                            "zero_bubble": ScheduleZBVZeroBubble}


def loss_rank(schedule: Schedule, ranks: int) -> int:
    """The rank of the last run, which has the loss."""
    return _placement(schedule, ranks)[-1]


class Pipeline:
    """One rank's part of a pipeline. Cuts `model` in place: the layers of other ranks are gone after it.

    Wrap what is left (adapters, tensor parallel, FSDP2) and train it by `train`.
    Called by hand, under `torch.no_grad()` and by all ranks of the pipeline together, the model evaluates and
    generates as a whole one: every rank has its logits, and the last its loss (the others 0).

    Attributes:
        runs: the layers of this rank, by the number of the run.
        is_first: this rank embeds the tokens.
        is_last: this rank has the output head, and so the loss.
    """

    def __init__(self, model: PreTrainedModel, group: dist.ProcessGroup, schedule: Schedule, device: torch.device,
                 hidden_dtype: torch.dtype = torch.float32, tensor: TensorParallel | None = None):
        """`group` are the ranks of one pipeline; `hidden_dtype` is the type of what they hand to each other.

        `tensor` will cut the model's matrices, and may spread the tokens over its ranks.

        Raises:
            ValueError: the model's family cannot be cut, or has fewer layers than there are runs.
        """
        self._model, self._group, self._schedule, self._device = model, group, schedule, device
        self._rank = dist.get_rank(group)
        self._rank_of_run = _placement(schedule, dist.get_world_size(group))
        self._dtype, self._tensor = hidden_dtype, tensor
        parts = Parts.of(model)
        runs = parts.runs(model, len(self._rank_of_run))
        self.runs = {index: run for index, run in enumerate(runs) if self._rank_of_run[index] == self._rank}
        self.is_first, self.is_last = 0 in self.runs, len(runs) - 1 in self.runs
        self._base, self._layers = parts.base, parts.layers
        self._owner = [self._rank_of_run[index] for index, run in enumerate(runs) for _ in run]
        self._skips = [Skip(layer, place, self._hand_on) for place, layer in enumerate(parts.layers)]
        embedding: Any = model.get_input_embeddings()
        self._width = embedding.weight.shape[1]
        copied = embedding.weight is model.get_output_embeddings().weight and self._rank_of_run[-1] != 0
        copy = cut(model, parts, first=self.is_first, last=self.is_last, dtype=hidden_dtype,
                   fetch_logits=self._fetch_logits)
        self._copy: Any = copy
        self._twin: Any = (embedding if self.is_first else copy) if copied else None
        self._own = frozenset(place for run in self.runs.values() for place in run)
        self._present = self._own  # the layers that run now
        for place in set(range(len(self._skips))) - self._own:
            self._layers[place] = self._skips[place]
        gc.collect()  # layers that recompute refer to themselves; those cut off may have adapters, which take memory
        if self.is_last:
            model.get_output_embeddings().register_forward_hook(self._share_logits)
        self._step: _Step | None = None
        self._linears = DeferredLinears() if schedule == "zero_bubble" else None
        self._cached: tuple[tuple[int, ...], Any] | None = None

    @property
    def copies(self) -> frozenset[nn.Parameter]:
        """Parameters of this rank that another stage has too, and counts (in norms, in checkpoints)."""
        return frozenset() if self._copy is None else frozenset({self._copy.weight})

    def train(self, root: nn.Module, batches: list[Batch], scale: float,
              compute: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext) -> Tensor:
        """Forward and backward of a step's micro-batches; gradients are added up.

        `root` is the model in its wrappers, `batches` its arguments with `targets`, all of one shape (and the same on
        all ranks of the pipeline), `compute` the context of a forward pass. Differentiated is the loss times `scale`.
        The sum of the losses on the last stage, 0 on the others.

        Raises:
            ValueError: micro-batches of several shapes, or not as many as the schedule wants; FSDP2 with zero bubble.
        """
        check_micro_batches(self._schedule, len(set(self._rank_of_run)), len(batches))
        shapes = {tuple(batch["input_ids"].shape) for batch in batches}
        if len(shapes) > 1:
            raise ValueError(f"the micro-batches of a pipeline step must have one shape, not {sorted(shapes)}")
        if self._schedule == "zero_bubble" and isinstance(root, FSDPModule):
            raise ValueError("schedule='zero_bubble' makes the gradients of weights after FSDP2 has sent them; "
                             "use schedule='interleaved', or zero=0")
        schedule = self._build_schedule(len(batches), self._hidden_shape(*shapes))
        step = _Step(root, batches, scale, compute, self._model.forward, backwards=len(batches) * len(self.runs),
                     loss=torch.zeros((), device=self._device))
        index = torch.arange(len(batches))
        self._step, self._model.forward = step, self._forward_run
        try:
            step.hold_gradients()
            schedule.step(index=index, target=index if self.is_last else None, return_outputs=False)
        finally:
            self._step, self._model.forward = None, step.forward
        return step.loss

    def sync_tied(self) -> None:
        """Add the gradients of a tied embedding's two copies, on the first stage and on the last."""
        if self._twin is None or not self._twin.weight.requires_grad:
            return
        gradient = self._twin.weight.grad
        mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        theirs = torch.empty_like(mine)
        peer = self._rank_of_run[-1] if self.is_first else 0
        operations = [dist.P2POp(dist.isend, mine, group=self._group, group_peer=peer),
                      dist.P2POp(dist.irecv, theirs, group=self._group, group_peer=peer)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        mine += theirs

    # --- training: one run of layers at a time, as the schedule says --------------------------------

    def _build_schedule(self, count: int, shape: tuple[int, ...]) -> Any:
        """torch's schedule for so many micro-batches of hidden states of that shape.

        The last one is kept. No more: it holds a buffer of each micro-batch's hidden states and of their gradients.
        """
        key = (count, *shape)
        if self._linears is not None:
            self._linears.attach(self._layers)
        if self._cached is None or self._cached[0] != key:
            hidden = torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)
            loss = torch.empty(1, device="meta", requires_grad=True)
            stages = [_TorchStage(
                _Stage(functools.partial(self._run, index)), index, len(self._rank_of_run), self._device, hidden,
                hidden if index < len(self._rank_of_run) - 1 else loss, group=self._group,
                dw_builder=None if self._linears is None else self._linears.take,
            ) for index in self.runs]
            several = self._schedule in ("interleaved", "zero_bubble")
            self._cached = key, _CLASSES[self._schedule](
                stages if several else stages[0], count, loss_fn=lambda loss, _: loss, scale_grads=False)
        return self._cached[1]

    def _hidden_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the hidden states between two stages, from that of the tokens."""
        rows, tokens = shape
        if self._tensor is not None and self._tensor.spread:
            tokens //= self._tensor.size
        return rows, tokens, self._width

    def _run(self, index: int, batch: int, hidden: Tensor | None) -> Tensor:
        """One run's forward pass for a micro-batch: its hidden states [B, T, C], or its scaled loss [1]."""
        step = self._step
        assert step is not None
        step.run, step.hidden = index, hidden
        with step.compute():
            out: Tensor = step.root(**step.batches[batch])
        if index == len(self._rank_of_run) - 1:
            step.loss += out.detach()
            out = (out * step.scale).reshape(1)
        out.register_hook(step.begin_backward)
        return out

    def _forward_run(self, *args: Any, **inputs: Any) -> Tensor:
        """The model's `forward` during a step: only the layers of the present run."""
        step = self._step
        assert step is not None
        with self._only(frozenset(self.runs[step.run])):
            if step.run == len(self._rank_of_run) - 1:
                loss: Tensor = step.forward(*args, **inputs)
                return loss
            for name in ("targets", "objective"):
                inputs.pop(name, None)
            self._base(*args, **inputs)
        hidden, step.hidden = step.hidden, None
        assert hidden is not None
        # Where all of a run is frozen, nothing asks for its gradient; the schedule sends one back nevertheless.
        return hidden if hidden.requires_grad else hidden.detach().requires_grad_()

    @contextlib.contextmanager
    def _only(self, present: frozenset[int]) -> Iterator[None]:
        """The context in which no other layers of this rank run."""
        absent = {place: self._layers[place] for place in self._own - present}
        for place in absent:
            self._layers[place] = self._skips[place]
        self._present = present
        try:
            yield
        finally:
            self._present = self._own
            for place, layer in absent.items():
                self._layers[place] = layer

    def _hand_on(self, place: int, hidden: Tensor) -> Tensor:
        """What a layer that does not run here does with its hidden states: they leave after a run, and arrive before.

        What the model makes of its input before a run (embeddings, their scale) is dropped here.
        """
        leaves, arrives = place - 1 in self._present, place + 1 in self._present
        if self._step is None:
            return self._relay(place, hidden, leaves, arrives)
        if leaves:
            self._step.hidden = hidden.to(self._dtype)
        elif arrives:
            assert self._step.hidden is not None
            return self._step.hidden
        return hidden

    # --- relay: all runs in order, without gradients ------------------------------------------------

    def _relay(self, place: int, hidden: Tensor, leaves: bool, arrives: bool) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("a pipeline trains by Pipeline.train; call its model under torch.no_grad()")
        if leaves:
            hidden = hidden.to(self._dtype).contiguous()
            dist.send(hidden, group=self._group, group_dst=self._owner[place])
        if arrives:
            hidden = torch.empty(hidden.shape, dtype=self._dtype, device=hidden.device)
            dist.recv(hidden, group=self._group, group_src=self._owner[place])
        return hidden

    def _share_logits(self, _: nn.Module, __: Any, logits: Tensor) -> Tensor:
        """After the head: all ranks get the logits, in fp32, and so choose the same next token."""
        if self._step is not None:
            return logits
        logits = logits.float().contiguous()
        dist.broadcast(logits, group=self._group, group_src=self._rank)
        return logits

    def _fetch_logits(self, shape: tuple[int, ...]) -> Tensor:
        logits = torch.empty(shape, device=self._device)
        dist.broadcast(logits, group=self._group, group_src=self._rank_of_run[-1])
        return logits


@dataclass
class _Step:
    """What the runs of one training step share."""

    root: nn.Module
    batches: list[Batch]
    scale: float
    compute: Callable[[], contextlib.AbstractContextManager[Any]]
    forward: Callable[..., Any]
    """The model's own `forward`, with the loss."""
    backwards: int
    """Backward passes of this rank that are still to come."""
    loss: Tensor
    run: int = 0
    """The run that is at work."""
    hidden: Tensor | None = None
    """Its hidden states: those that arrived, then those that leave."""

    def hold_gradients(self) -> None:
        """FSDP2 keeps its gradients and gathered weights until the last backward pass of this rank."""
        self._set_fsdp(False)

    def begin_backward(self, _: Tensor) -> None:
        """Called as a backward pass begins. FSDP2 exchanges the gradients of *all* its modules in the last."""
        self.backwards -= 1
        if self.backwards == 0:
            self._set_fsdp(True)

    def _set_fsdp(self, last: bool) -> None:
        if isinstance(self.root, FSDPModule):
            self.root.set_is_last_backward(last)
            self.root.set_reshard_after_backward(last)
            self.root.set_requires_gradient_sync(last)


class _TorchStage(PipelineStage):
    """torch's, which before 2.13 greets its neighbours first, and where that is the same rank, gloo fails."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _Stage(nn.Module):
    """A run of layers as torch's schedules call it: by the number of the micro-batch, `index` [1]."""

    def __init__(self, run: Callable[[int, Tensor | None], Tensor]):
        super().__init__()
        self._run = run

    @override
    def forward(self, *hidden: Tensor, index: Tensor) -> Tensor:
        return self._run(int(index), hidden[0] if hidden else None)


def _placement(schedule: Schedule, ranks: int) -> list[int]:
    """The rank of every run, in the order of the layers. Zero bubble goes down the ranks and up again: a V."""
    down = list(range(ranks))
    match schedule:
        case "interleaved":
            return down + down
        case "zero_bubble":
            return down + down[::-1]
        case _:
            return down
