"""What a rank computes in one optimizer step, whoever watches: the loop, or a plan that has no data and no weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from collie_lab import optim
from collie_lab.cells import Adan, Experiment, RuleCell, Sophia
from collie_lab.data import Documents, Extension, Tokenizer
from collie_lab.data.order import Step
from collie_lab.parallel import Strategy
from collie_lab.training.batch import Batch, collate
from collie_lab.training.model import BuiltModel, build_model
from collie_lab.training.optimizer import build_optimizer
from collie_lab.training.packed import ATTENTION
from collie_lab.training.padding import level

__all__ = ["TrainingStep"]


class TrainingStep:
    """The model and the optimizer of an experiment in their layout, and what a step does with them.

    Attributes:
        built: the model before it was wrapped, and what was counted while it was whole.
        model: the module that is trained, in its layout.
        optimizer: the torch optimizer.
        flat: documents share a row without padding; else each has a padded row.
    """

    def __init__(self, experiment: Experiment, device: torch.device, strategy: Strategy,
                 extension: Extension | None = None, tokenizer: Tokenizer | None = None,
                 say: Callable[..., None] = lambda **_: None):
        """`say(shape=...)` is called before every micro-batch; `extension` and `tokenizer` are those of `build_model`.
        On all ranks together.

        Raises:
            ValueError: the model, the adapter, the optimizer and the layout do not go together.
        """
        self._experiment, self._device, self._strategy, self._say = experiment, device, strategy, say
        self.built: BuiltModel = build_model(experiment, device, strategy, extension, tokenizer)
        self.flat = self.built.causal_lm.config._attn_implementation == ATTENTION
        root = self.built.root.train()
        wrapped = strategy.wrap(root, experiment.optimizer.in_backward)
        self.optimizer = build_optimizer(experiment, root, strategy)
        self.model: nn.Module = strategy.prepare(wrapped, self.optimizer)

    def measure(self, documents: Documents, plan: Step) -> None:
        """Where clipping in backward wants the norm first: a pass of its own that finds it."""
        if isinstance(self.optimizer, optim.RuleOptimizer) and self.optimizer.needs_measure:
            # The same dropout in both passes.
            devices = [self._device] if self._device.type == "cuda" else []
            with self.optimizer.measure(), torch.random.fork_rng(devices):
                self.forward_backward(documents, plan)

    def forward_backward(self, documents: Documents, plan: Step, draw: tuple[int, ...] | None = None
                         ) -> tuple[Tensor, int]:
        """The gradient of the mean loss of a step's tokens; the sum of this rank's losses, and the work of attention.

        With `draw`, a seed, the loss is that of labels which the model draws itself.
        """
        scale = self._experiment.parallel.dp / plan.targets  # of a sum; gradients are averaged over the ranks
        batches = [collate(documents, indices, self._device, flat=self.flat, draw=draw,
                           multiple=self._strategy.multiple, virtual=self._experiment.virtual)
                   for indices in plan.micro_batches]
        if self._strategy.pipeline is not None:
            self._say(shape=batches[0].shape)
            loss_sum = self._strategy.pipeline.train(self.model, level([batch.inputs for batch in batches]), scale,
                                                     self._strategy.compute)
        else:
            loss_sum = self._accumulate(batches, scale)
        self._strategy.exchange(self.model)
        return loss_sum, sum(batch.attended for batch in batches)

    def _accumulate(self, batches: list[Batch], scale: float) -> Tensor:
        """Forward and backward, micro-batch by micro-batch; the sum of the losses."""
        loss_sum, cell = torch.zeros((), device=self._device), self._experiment.optimizer
        accumulate = cell.accumulate if isinstance(cell, RuleCell) and cell.in_backward else None
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            self._say(shape=batch.shape)
            with contextlib.ExitStack() as contexts:
                contexts.enter_context(self._strategy.micro_batch(self.model, exchange=last or accumulate == "each"))
                if accumulate == "hold" and not last:
                    contexts.enter_context(self.optimizer.hold())  # type: ignore[attr-defined]
                with self._strategy.compute():
                    loss = self.model(**batch.inputs)
                self._strategy.backward(loss * scale, last)
            loss_sum += loss.detach()
        return loss_sum

    def update(self, step: int) -> Tensor:
        """Clip and step, for the step of this number; the norm of the gradient before clipping, NaN where it was never
        whole."""
        optimizer, training = self.optimizer, self._experiment.training
        norm = None
        if isinstance(optimizer, optim.RuleOptimizer):
            norm = self._strategy.update(optimizer)
        else:
            norm = optim.clip_gradients(optimizer, training.clip_grad_norm, training.clip_grad_value,
                                        **self._strategy.stages)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        cell = self._experiment.optimizer
        if isinstance(cell, Adan) and cell.restart_every and step % cell.restart_every == 0:
            optimizer.restart()  # type: ignore[attr-defined]
        return torch.full((), math.nan, device=self._device) if norm is None else norm.to(self._device, torch.float32)

    def refresh_hessian(self, documents: Documents, plan: Step, step: int) -> Tensor:
        """Sophia, every so many steps: its Hessian from labels that the model draws. The share it does not clip."""
        cell, optimizer = self._experiment.optimizer, self.optimizer
        if not isinstance(cell, Sophia) or step % cell.hessian_every:
            return torch.full((), math.nan, device=self._device)
        assert isinstance(optimizer, optim.RuleOptimizer)
        with optimizer.refresh_hessian(plan.targets):
            self.forward_backward(documents, plan, draw=(self._experiment.training.seed, step))
        return optimizer.unclipped_share().to(self._device, torch.float32)
