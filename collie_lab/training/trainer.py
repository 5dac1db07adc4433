"""The one explicit loop: what a rank does from the first step to the last."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from collie_lab import optim
from collie_lab.cells import Evaluation, Experiment
from collie_lab.data import Documents, Order, Tokenizer, sequence_length
from collie_lab.data.order import Step
from collie_lab.folder import JsonLines, RunFolder
from collie_lab.parallel import build_strategy
from collie_lab.training.batch import collate
from collie_lab.training.checkpoint import load_checkpoint, save_checkpoint
from collie_lab.training.evaluate import evaluate
from collie_lab.training.export import export_model
from collie_lab.training.flops import StepFlops, peak_flops
from collie_lab.training.memory import CpuMemory, build_memory
from collie_lab.training.meters import Meters, StepFigures
from collie_lab.training.model import build_model
from collie_lab.training.packed import ATTENTION
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
        self._events = JsonLines(folder.path / "events.jsonl") if self.rank == 0 else None
        self._stop_wish = False

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> str:
        """Train to the last step; the status: `ok`, `stopped` or `diverged`."""
        began = time.perf_counter()
        self._build()
        training, status = self.experiment.training, "ok"
        for plan in itertools.islice(self._order.steps(self.step), training.steps - self.step):
            self.step += 1
            self._set_learning_rate()
            self._train_step(plan)
            for callback in self.experiment.callbacks:
                callback(self)
            if (verdict := self._verdict(self._meters.pull())) is not None:
                status = verdict
                break
            if self.step < training.steps:
                self._evaluate(self._due)
            if training.checkpoint_every and self.step % training.checkpoint_every == 0:
                self.save_checkpoint()
        status = self._verdict(self._meters.pull(all_=True)) or status
        self._finish(status, began)
        return status

    def _train_step(self, plan: Step) -> None:
        """One optimizer step: forward and backward over the micro-batches, clipping, update."""
        began, attended = self._meters.mark(), 0
        loss_sum = torch.zeros((), device=self.device)
        with self._memory.step(self.step - self._first_step):
            for index, documents in enumerate(plan.micro_batches):
                batch = collate(self._documents, documents, self.device, flat=self._flat)
                attended += batch.attended
                with self._strategy.micro_batch(self.model, last=index == len(plan.micro_batches) - 1):
                    with self._strategy.compute():
                        loss = self.model(**batch.inputs)
                    # Gradients are averaged over the ranks: this makes it the mean over all their tokens.
                    (loss * (self._strategy.dp_size / plan.targets)).backward()
                loss_sum += loss.detach()
            grad_norm = self._clip()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        # A tensor from a host number would wait for the device; a filled one does not.
        stop = torch.full_like(loss_sum, float(self._wants_stop()))
        values = self._strategy.total(torch.stack([loss_sum, stop]))
        self._meters.push(
            self.step, torch.stack([values[0] / plan.targets, grad_norm, values[1]]),
            lr=self.optimizer.param_groups[0]["lr"], tokens=plan.tokens, memory=self._memory.step_bytes, began=began,
            flops=self._flops.of(plan.tokens, attended * self._strategy.dp_size),
            timed=not self._memory.recorded,
        )

    def _clip(self) -> Tensor:
        """The global gradient norm; gradients are scaled down where it exceeds the limit."""
        if isinstance(self.optimizer, optim.Lomo):
            return self._strategy.global_norm(self.optimizer.pop_norms())
        gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                     for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self._strategy.global_norm(list(torch._foreach_norm(gradients, dtype=torch.float32)))
        if (limit := self.experiment.training.clip_grad_norm) is not None:
            torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
        return norm

    def _set_learning_rate(self) -> None:
        factor = learning_rate_factor(self.experiment.training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    # --- what a callback may use ------------------------------------------------------------------

    def stop(self) -> None:
        """End the run after this step, with a checkpoint and a result."""
        self._stop_wish = True

    def save_checkpoint(self) -> None:
        """Write a checkpoint now; on all ranks together."""
        path = save_checkpoint(self.folder.checkpoints, self.step, self._adapted, self.optimizer,
                               keep=self.experiment.training.keep_checkpoints, identity=self._identity())
        self.event("checkpoint", step=self.step, path=str(path.relative_to(self.folder.path)))

    def event(self, kind: str, **fields: Any) -> None:
        """A line in `events.jsonl`, from rank 0."""
        if self._events:
            self._events.append({"time": time.time(), "kind": kind, **fields})

    # --- before and after -------------------------------------------------------------------------

    def _build(self) -> None:
        """Everything the loop uses, from the cells."""
        experiment, training = self.experiment, self.experiment.training
        self._memory = build_memory(self.device)
        self.event("phase", text="loading the model")
        self._strategy = build_strategy(experiment.parallel, self.device, training.precision)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ModelWarning)
            self._causal_lm, adapted = build_model(experiment, self.device)
        for warning in caught:
            if issubclass(warning.category, ModelWarning):
                self.event("warning", text=str(warning.message))
        self._flat = self._causal_lm.config._attn_implementation == ATTENTION  # else padded rows, with masks
        adapted.train()
        self._counts = {"parameters": sum(p.numel() for p in adapted.parameters()),
                        "trainable": sum(p.numel() for p in adapted.parameters() if p.requires_grad)}
        self._flops = StepFlops.of_model(self._causal_lm)
        self.model = self._strategy.wrap(adapted, experiment.optimizer.in_backward)
        self._adapted: Any = adapted
        self.optimizer = optim.build(experiment.optimizer, self.model, self._strategy.reduce)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        torch.manual_seed(training.seed * 1000 + self.rank)  # dropout differs between ranks
        self._meters = Meters(self.folder if self.rank == 0 else None, self.device,
                              experiment.parallel.world_size, peak_flops(self.device))
        self._tokenizer = Tokenizer(self.folder.path / "tokenizer")
        self._build_data()
        if resume := self._launch.get("resume_from"):
            self.step = load_checkpoint(RunFolder(resume).path, self._adapted, self.optimizer)
        self._first_step = self.step
        if isinstance(self._memory, CpuMemory):
            self._memory.probe = self._heaviest_step()
        self.event("start", step=self.step, steps=training.steps, world_size=experiment.parallel.world_size,
                   device=str(self.device.type), **self._counts)

    def _build_data(self) -> None:
        data, training = self.experiment.data, self.experiment.training
        folder = self.folder.path / "data"
        self._documents = Documents.load(folder / "train")
        index = self.folder.read("data/index.json")
        self._held_out = [Documents.load(folder / name) for name in index["evaluations"]]
        for text in index["warnings"]:
            self.event("warning", text=text)
        dp_size = self._strategy.dp_size
        context = getattr(self._causal_lm.config.get_text_config(),
                          "max_position_embeddings", None)
        self._order = Order(
            self._documents, batch_size=training.batch_size, seed=training.seed, shuffle=data.shuffle,
            micro_batch_size=training.micro_batch_size or training.batch_size // dp_size,
            dp_rank=self._strategy.dp_rank, dp_size=dp_size,
            packing=sequence_length(data, context) if data.packing else None,
        )

    def _heaviest_step(self) -> set[int]:
        """The step with most tokens among the first thousand to come, counted from the first; one for all ranks."""
        count = min(1000, self.experiment.training.steps - self.step)
        sizes = [plan.tokens for plan in itertools.islice(self._order.steps(self.step), count)]
        return {sizes.index(max(sizes)) + 1} if sizes else set()

    def _identity(self) -> dict[str, Any]:
        """What a run must share with the one it resumes."""
        experiment = self.experiment
        return {"optimizer": experiment.optimizer.kind, "batch_size": experiment.training.batch_size,
                "seed": experiment.training.seed, "data": self.folder.read("data/index.json")["fingerprint"]}

    def _wants_stop(self) -> bool:
        self._heed_stop()
        return self._stop_wish

    def _heed_stop(self) -> None:
        """Tell that the stop flag was seen: who set it then waits for the step, however long, before it kills."""
        if self.rank == 0 and not self._stop_wish and self.folder.stop_flag.exists():
            self._stop_wish = True
            self.event("stopping", step=self.step)

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
                figures = evaluate(cell, self._adapted, documents, self._tokenizer, self._strategy, flat=self._flat,
                                   tick=self._heed_stop)
                self.event("evaluation", step=self.step, **figures)
                found |= figures
        return found

    def _finish(self, status: str, began: float) -> None:
        """Keep what was trained (checkpoint, model) before anything else can fail; evaluate; write the result."""
        self.event("ending", step=self.step)
        self._memory.close()
        training = self.experiment.training
        if status == "stopped":
            self.save_checkpoint()
        if training.export and status != "diverged":
            self.event("phase", text="writing the model")
            export_model(self._adapted, self._tokenizer, self.folder)
        figures = self._evaluate(lambda cell: True) if status == "ok" else {}
        peak = torch.tensor(float(self._memory.peak_bytes or 0), dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        if self.rank == 0:
            summary = self._meters.summary()
            if status == "diverged":
                summary["loss"] = None
            self.folder.write("result.json", {
                "status": status, "steps": self.step, **summary, **figures, "peak_bytes": int(peak.item()),
                "seconds": time.perf_counter() - began, "world_size": self.experiment.parallel.world_size,
                **self._counts,
            })
        self.event("end")
