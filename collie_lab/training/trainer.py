"""The one explicit loop: what a rank does from the first step to the last."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from collie_lab import optim
from collie_lab.beat import Beat
from collie_lab.cells import AdaLoRA, Adan, Evaluation, Experiment, LibraryOptimizer, RuleCell, ScheduleFree, Sophia
from collie_lab.data import Documents, Order, Tokenizer, room_for_documents, sequence_length
from collie_lab.data.order import Step
from collie_lab.folder import JsonLines, RunFolder, read_json
from collie_lab.parallel import build_strategy
from collie_lab.training.answers import Answers
from collie_lab.training.batch import Batch, collate
from collie_lab.training.budget import attach_budget
from collie_lab.training.checkpoint import Checkpointer, Written, load_checkpoint
from collie_lab.training.evaluate import evaluate
from collie_lab.training.export import export_model
from collie_lab.training.flops import peak_flops
from collie_lab.training.memory import NoMemory, build_memory
from collie_lab.training.meters import Meters, StepFigures
from collie_lab.training.model import build_model
from collie_lab.training.packed import ATTENTION
from collie_lab.training.padding import level
from collie_lab.training.probe import ModelWarning
from collie_lab.training.schedule import learning_rate_factor

__all__ = ["Trainer"]


class Trainer:
    """One rank's part of a run. Callbacks get it after every step.

    Attributes:
        experiment: what runs.
        step: optimizer steps done.
        model: the module that is trained, in its layout (sharded, adapted).
        optimizer: the torch optimizer.
        rank: this process among all.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, device: torch.device):
        self.experiment, self.folder, self.device = experiment, folder, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.step = 0
        self._launch = folder.read("launch.json")
        self._beat = Beat(folder, self.rank, shared=bool(self._launch.get("nodes")))
        self._events = JsonLines(folder.path / "events.jsonl") if self.rank == 0 else None
        self._stop_wish = False

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> str:
        """Train to the last step; the status: `ok`, `stopped` or `diverged`."""
        began = time.perf_counter()
        self._build()
        with contextlib.closing(self._checkpoints):
            status = self._loop()
            self._finish(status, began)
        self._beat.close()
        return status

    def _loop(self) -> str:
        training, status = self.experiment.training, "ok"
        for plan in itertools.islice(self._order.steps(self.step), training.steps - self.step):
            self.step += 1
            self._set_learning_rate()
            self._train_step(plan)
            for callback in self.experiment.callbacks:
                callback(self)
            self._checkpoints.poll()
            figures = self._meters.pull()
            if (verdict := self._verdict(figures)) is not None:
                status = verdict
                break
            if any(step.asked for step in figures):
                self._answer()
            if self.step < training.steps:
                self._evaluate(self._due)
            if training.checkpoint_every and self.step % training.checkpoint_every == 0:
                self.save_checkpoint()
        return self._verdict(self._meters.pull(all_=True)) or status

    def _train_step(self, plan: Step) -> None:
        """One optimizer step: forward and backward over the micro-batches, clipping, update."""
        began, optimizer = self._meters.mark(), self.optimizer
        self._beat.say("step", step=self.step)
        with self._memory.step():
            if isinstance(optimizer, optim.RuleOptimizer) and optimizer.needs_measure:
                # The same dropout in both passes.
                devices = [self.device] if self.device.type == "cuda" else []
                with optimizer.measure(), torch.random.fork_rng(devices):
                    self._forward_backward(plan)
            loss_sum, attended = self._forward_backward(plan)
            grad_norm = self._update()
            unclipped = self._refresh_hessian(plan)
        # A tensor from a host number would wait for the device; a filled one does not.
        stop, asked = (torch.full_like(loss_sum, float(flag)) for flag in (self._wants_stop(), self._answers.wanted))
        values = self._strategy.total(torch.stack([self._strategy.counted(loss_sum), stop, asked]))
        self._meters.push(
            self.step, torch.stack([values[0] / plan.targets, grad_norm, values[1], values[2], unclipped]),
            lr=optimizer.param_groups[0]["lr"], tokens=plan.tokens, memory=self._memory.step_bytes, began=began,
            flops=self._flops.of(plan.tokens, attended * self.experiment.parallel.dp),
        )

    def _forward_backward(self, plan: Step, draw: tuple[int, ...] | None = None) -> tuple[Tensor, int]:
        """The gradient of the mean loss of a step's tokens; the sum of this rank's losses, and the work of attention.

        With `draw`, a seed, the loss is that of labels which the model draws itself.
        """
        experiment = self.experiment
        scale = experiment.parallel.dp / plan.targets  # of a sum; gradients are averaged over the ranks
        batches = [collate(self._documents, documents, self.device, flat=self._flat, draw=draw,
                           multiple=self._strategy.multiple, virtual=experiment.virtual)
                   for documents in plan.micro_batches]
        if self._strategy.pipeline is not None:
            self._beat.say("step", shape=batches[0].shape)
            loss_sum = self._strategy.pipeline.train(self.model, level([batch.inputs for batch in batches]), scale,
                                                     self._strategy.compute)
        else:
            loss_sum = self._accumulate(batches, scale)
        self._strategy.exchange(self.model)
        return loss_sum, sum(batch.attended for batch in batches)

    def _accumulate(self, batches: list[Batch], scale: float) -> Tensor:
        """Forward and backward, micro-batch by micro-batch; the sum of the losses."""
        loss_sum, cell = torch.zeros((), device=self.device), self.experiment.optimizer
        accumulate = cell.accumulate if isinstance(cell, RuleCell) and cell.in_backward else None
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            self._beat.say("step", shape=batch.shape)
            with contextlib.ExitStack() as contexts:
                contexts.enter_context(self._strategy.micro_batch(self.model, exchange=last or accumulate == "each"))
                if accumulate == "hold" and not last:
                    contexts.enter_context(self.optimizer.hold())  # type: ignore[attr-defined]
                with self._strategy.compute():
                    loss = self.model(**batch.inputs)
                self._strategy.backward(loss * scale, last)
            loss_sum += loss.detach()
        return loss_sum

    def _update(self) -> Tensor:
        """Clip and step; the norm of the gradient before clipping, NaN where it was never whole."""
        optimizer, limit = self.optimizer, self.experiment.training.clip_grad_norm
        norm = None
        if isinstance(optimizer, optim.RuleOptimizer):
            norm = self._strategy.update(optimizer)
        else:
            norm = optim.clip_gradients(optimizer, limit, self.experiment.training.clip_grad_value,
                                        **self._strategy.stages)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        cell = self.experiment.optimizer
        if isinstance(cell, Adan) and cell.restart_every and self.step % cell.restart_every == 0:
            optimizer.restart()  # type: ignore[attr-defined]
        return torch.full((), math.nan, device=self.device) if norm is None else norm.to(self.device, torch.float32)

    def _refresh_hessian(self, plan: Step) -> Tensor:
        """Sophia, every so many steps: its Hessian from labels that the model draws. The share it does not clip."""
        cell, optimizer = self.experiment.optimizer, self.optimizer
        if not isinstance(cell, Sophia) or self.step % cell.hessian_every:
            return torch.full((), math.nan, device=self.device)
        assert isinstance(optimizer, optim.RuleOptimizer)
        with optimizer.refresh_hessian(plan.targets):
            self._forward_backward(plan, draw=(self.experiment.training.seed, self.step))
        return optimizer.unclipped_share().to(self.device, torch.float32)

    def _set_learning_rate(self) -> None:
        factor = learning_rate_factor(self.experiment.training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    # --- what a callback may use ------------------------------------------------------------------

    def stop(self) -> None:
        """End the run after this step, with a checkpoint and a result."""
        self._stop_wish = True

    def save_checkpoint(self) -> None:
        """Take a checkpoint now, and write it while the training goes on; on all ranks together."""
        self._beat.say("checkpoint")
        self._checkpoints.save(self.step, *self._strategy.snapshot(self._adapted, self.optimizer))

    def _tell_of_checkpoint(self, written: Written) -> None:
        self.event("checkpoint", step=written.step, path=str(written.path.relative_to(self.folder.path)),
                   blocked=written.blocked)

    def event(self, kind: str, **fields: Any) -> None:
        """A line in `events.jsonl`, from rank 0."""
        if self._events:
            self._events.append({"time": time.time(), "kind": kind, **fields})

    # --- before and after -------------------------------------------------------------------------

    def _build(self) -> None:
        """Everything the loop uses, from the cells."""
        experiment, training = self.experiment, self.experiment.training
        self._memory = build_memory(self.device)
        if isinstance(self._memory, NoMemory):
            self.event("warning", text=self._memory.reason)
        self._tokenizer = Tokenizer(self.folder.path / "tokenizer")
        self.event("phase", text="loading the model")
        self._strategy = build_strategy(experiment.parallel, self.device, training.precision)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ModelWarning)
            built = build_model(experiment, self.device, self._strategy, self._tokenizer)
        for warning in caught:
            if issubclass(warning.category, ModelWarning):
                self.event("warning", text=str(warning.message))
        self._causal_lm, adapted, self._flops = built.causal_lm, built.root, built.flops
        self._flat = self._causal_lm.config._attn_implementation == ATTENTION  # else padded rows, with masks
        adapted.train()
        self._counts = {"parameters": built.parameters, "trainable": built.trainable}
        self.model = self._strategy.wrap(adapted, experiment.optimizer.in_backward)
        self._adapted: Any = adapted
        # By the names of the model itself: wrappers lengthen them.
        cell = experiment.scaled_optimizer
        self.optimizer = optim.build(cell, adapted) if isinstance(cell, LibraryOptimizer) else optim.build(
            self._strategy.held(cell), adapted, max_value=training.clip_grad_value, seed=training.seed,
            **self._strategy.optimizer_options(training.clip_grad_norm))
        if isinstance(experiment.adapter, AdaLoRA):
            attach_budget(adapted, self.optimizer, lambda: self.step)
        self.model = self._strategy.prepare(self.model, self.optimizer)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        # Dropout differs between ranks that see other tokens; tensor-parallel ranks draw alike (`parallel.tensor`).
        seed = training.seed * 1000 + self.rank // experiment.parallel.tp
        torch.manual_seed(seed)
        self._meters = Meters(self.folder if self.rank == 0 else None, self.device,
                              experiment.parallel.world_size, peak_flops(self.device))
        self._build_data()
        self._answers = Answers(self.folder, self.rank, self._tokenizer, self.folder.read("data/index.json")["style"],
                                training.seed)
        layout = experiment.parallel.model_dump(include={"dp", "tp", "pp"})
        self._checkpoints = Checkpointer(self.folder.checkpoints, keep=training.keep_checkpoints, layout=layout,
                                         identity=self._identity(), on_written=self._tell_of_checkpoint)
        if resume := self._launch.get("resume_from"):
            self._check_frozen(RunFolder(resume).path)
            read = functools.partial(load_checkpoint, RunFolder(resume).path, layout=layout, seed=seed)
            self.step = self._strategy.load(read, self._adapted, self.optimizer)
        self.event("start", step=self.step, steps=training.steps, world_size=experiment.parallel.world_size,
                   device=str(self.device.type), **self._counts)

    def _build_data(self) -> None:
        data, training, parallel = self.experiment.data, self.experiment.training, self.experiment.parallel
        folder = self.folder.path / "data"
        self._documents = Documents.load(folder / "train")
        index = self.folder.read("data/index.json")
        self._held_out = [Documents.load(folder / name) for name in index["evaluations"]]
        for text in index["warnings"]:
            self.event("warning", text=text)
        context = getattr(self._causal_lm.config.get_text_config(), "max_position_embeddings", None)
        self._order = Order(
            self._documents, batch_size=training.batch_size, seed=training.seed, shuffle=data.shuffle,
            micro_batch_size=parallel.micro_batch_size(training.batch_size, training.micro_batch_size),
            dp_rank=self._strategy.place.dp, dp_size=parallel.dp,
            packing=sequence_length(data, room_for_documents(self.experiment, context)) if data.packing else None,
        )

    def _identity(self) -> dict[str, Any]:
        """What a run must share with the one it resumes."""
        experiment = self.experiment
        return {"optimizer": experiment.optimizer.kind, "batch_size": experiment.training.batch_size,
                "seed": experiment.training.seed, "data": self.folder.read("data/index.json")["fingerprint"],
                "drawn_on": self._drawn_on()}

    def _drawn_on(self) -> str | None:
        """What drew frozen random weights, which no checkpoint keeps; another GPU draws others."""
        if self.experiment.model.init != "random" or self._counts["trainable"] == self._counts["parameters"]:
            return None
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def _check_frozen(self, checkpoint: Path) -> None:
        drawn_on = read_json(checkpoint / "state.json").get("identity", {}).get("drawn_on")
        if drawn_on is not None and drawn_on != self._drawn_on():
            raise ValueError(f"the frozen random weights of {checkpoint} were drawn by another device ({drawn_on}), "
                             f"and are others here ({self._drawn_on()}): resume there, or begin with saved weights")

    def _wants_stop(self) -> bool:
        self._heed_stop()
        return self._stop_wish

    def _heed_stop(self) -> None:
        """Tell that the stop flag was seen: who set it then waits for the step, however long, before it kills."""
        if self.rank == 0 and not self._stop_wish and self.folder.stop_flag.exists():
            self._stop_wish = True
            self.event("stopping", step=self.step)

    def _tick(self) -> None:
        """Between two batches of an evaluation."""
        self._beat.say("evaluation")
        self._heed_stop()

    def _verdict(self, figures: list[StepFigures]) -> str | None:
        """Why the run ends before its last step, or None. All ranks see the same figures."""
        if any(not math.isfinite(step.loss) for step in figures):
            return "diverged"
        if any(step.stop for step in figures) and self.step < self.experiment.training.steps:
            return "stopped"
        return None

    def _due(self, cell: Evaluation) -> bool:
        return cell.every is not None and self.step % cell.every == 0

    def _evaluate(self, due: Callable[[Evaluation], bool]) -> dict[str, float]:
        """Run the evaluations that are due; their figures, also as events."""
        found: dict[str, float] = {}
        for cell, documents in zip(self.experiment.evaluate, self._held_out, strict=True):
            if due(cell):
                with self._averaged():
                    figures = evaluate(cell, self._adapted, documents, self._tokenizer, self._strategy,
                                       flat=self._flat, virtual=self.experiment.virtual, tick=self._tick)
                self.event("evaluation", step=self.step, **figures)
                found |= figures
        return found

    def _answer(self) -> None:
        """Let the model answer what it has been asked."""
        with self._averaged():
            self._answers.give(self.step, self._adapted, self._strategy, lambda: self._beat.say("answer"))

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Schedule-Free trains at one point and is judged at another, the average of its steps."""
        if not isinstance(self.experiment.optimizer, ScheduleFree):
            yield
            return
        optimizer: Any = self.optimizer
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()

    def _finish(self, status: str, began: float) -> None:
        """Keep what was trained (checkpoint, model) before anything else can fail; evaluate; write the result."""
        self.event("ending", step=self.step)
        training = self.experiment.training
        if status == "stopped":
            self.save_checkpoint()
        self._checkpoints.finish()
        if training.export and status != "diverged":
            self._beat.say("export")
            self.event("phase", text="writing the model")
            with self._averaged():
                export_model(self._adapted, self._tokenizer, self.folder, self._strategy)
        figures = self._evaluate(lambda cell: True) if status == "ok" else {}
        peak = torch.tensor(float(self._memory.peak_bytes or 0), dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        if self.rank == 0:
            summary = self._meters.summary()
            if status == "diverged":
                summary["loss"] = None
            self.folder.write("result.json", {
                "status": status, "steps": self.step, **summary, **figures, "peak_bytes": int(peak.item()) or None,
                "seconds": time.perf_counter() - began, "world_size": self.experiment.parallel.world_size,
                **self._counts,
            })
        self.event("end")
