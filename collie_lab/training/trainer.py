"""The one explicit loop: what a rank does from the first step to the last."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from collie_lab import optim
from collie_lab.beat import Beat
from collie_lab.cells import AdaLoRA, BestCheckpoint, Evaluation, Experiment
from collie_lab.data import Documents, Extension, Order, Tokenizer, room_for_documents, sequence_length
from collie_lab.data.order import Step
from collie_lab.data.questions import load_questions
from collie_lab.folder import Board, JsonLines, RunFolder, read_json, write_lines
from collie_lab.parallel import build_strategy
from collie_lab.training.answers import Answers
from collie_lab.training.budget import attach_budget, forget_choice
from collie_lab.training.callbacks import Callbacks
from collie_lab.training.checkpoint import Checkpointer, Written
from collie_lab.training.ending import ending
from collie_lab.training.evaluate import evaluate, file_name
from collie_lab.training.export import export_model
from collie_lab.training.finite import finite_everywhere
from collie_lab.training.flops import peak_flops
from collie_lab.training.identity import check_frozen, identity
from collie_lab.training.memory import NoMemory, build_memory, held_bytes, worst_rank
from collie_lab.training.meters import Meters, StepFigures
from collie_lab.training.optimizer import set_learning_rate
from collie_lab.training.probe import model_warnings
from collie_lab.training.restore import load_checkpoint
from collie_lab.training.so_far import SoFar
from collie_lab.training.step import TrainingStep

__all__ = ["Trainer"]


class Trainer:
    """One rank's part of a run: what callbacks get.

    Attributes:
        experiment: what runs.
        step: optimizer steps done.
        model: the module that is trained, in its layout (sharded, adapted).
        optimizer: the torch optimizer.
        rank: this process among all.
        resumed_from: the checkpoint that the run goes on from, if it does.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, device: torch.device):
        self.experiment, self.folder, self.device = experiment, folder, device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.step = 0
        self._launch = folder.read("launch.json")
        resume = self._launch.get("resume_from")
        self.resumed_from = RunFolder(resume).path if resume else None
        self._beat = Beat(folder, self.rank, shared=bool(self._launch.get("nodes")))
        self._events = JsonLines(folder.path / "events.jsonl") if self.rank == 0 else None
        self._stop_wish = self._best_wish = False
        self._reason = ""  # why the run ends before its last step
        self._complete = False  # `finish` has been called
        self._best: Mapping[str, Any] | None = None  # the checkpoint to go back to at the end
        self._so_far, self._began_at, self._held = SoFar(experiment, device), 0, dict[str, int]()
        self._callbacks = Callbacks(experiment)

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> str:
        """Train to the last step; the status: `ok`, `stopped` or `diverged`."""
        try:
            self._build()
            self._callbacks.on_start(self)
            with contextlib.closing(self._checkpoints):
                self._catch_up()
                status = self._finish("ok" if self._complete else self._loop())
        except BaseException as error:
            self._callbacks.on_exception(self, error)
            raise
        self._beat.close()
        return status

    def _loop(self) -> str:
        training, status = self.experiment.training, "ok"
        for plan in itertools.islice(self._order.steps(self.step), training.steps - self.step):
            self.step += 1
            set_learning_rate(self.optimizer, self.experiment, self.step)
            self._callbacks.before_step(self)
            self._train_step(plan)
            self._callbacks.after_step(self)
            self._checkpoints.poll()
            figures = self._pull()
            if (verdict := self._verdict(figures)) is not None:
                status = verdict
                break
            if any(step.asked for step in figures):
                self._answer()
            if self.step < training.steps:
                self._evaluate(self._due)
            rolling = training.checkpoint_every is not None and self.step % training.checkpoint_every == 0
            if rolling or self._best_wish:
                self.save_checkpoint(rolling=rolling)
            if self._complete:
                break
        late = self._verdict(self._pull(all_=True))
        return status if late is None or status == "diverged" else late

    def _catch_up(self) -> None:
        """A run that was stopped left undone what was due after its last step."""
        if self.resumed_from is not None:
            self._evaluate(self._due)
            if self._best_wish:
                self.save_checkpoint(rolling=False)

    def _pull(self, *, all_: bool = False) -> list[StepFigures]:
        """The figures that have come in, which callbacks get too."""
        figures = self._meters.pull(all_=all_)
        for step in figures:
            self._callbacks.on_metrics(self, step.record)
        return figures

    def _train_step(self, plan: Step) -> None:
        """One optimizer step: forward and backward over the micro-batches, clipping, update."""
        began, step = self._meters.mark(), self._step
        self._beat.say("step", step=self.step)
        with self._memory.step():
            step.measure(self._documents, plan)
            loss_sum, attended = step.forward_backward(self._documents, plan)
            self._callbacks.before_update(self)
            if self.step == self._began_at + 2 and self.experiment.parallel.engine == "torch":
                self._held = held_bytes(self._adapted, self.optimizer)  # the first step makes states
            grad_norm = step.update(self.step)
            unclipped = step.refresh_hessian(self._documents, plan, self.step)
        # A tensor from a host number would wait for the device; a filled one does not.
        stop, asked = (torch.full_like(loss_sum, float(flag)) for flag in (self._heed_stop(), self._answers.wanted))
        values = self._strategy.total(torch.stack([self._strategy.counted(loss_sum), stop, asked]))
        self._meters.push(
            self.step, torch.stack([values[0] / plan.targets, grad_norm, values[1], values[2], unclipped]),
            lr=self.optimizer.param_groups[0]["lr"], tokens=plan.tokens, memory=self._memory.step_bytes, began=began,
            flops=self._flops.of(plan.tokens, attended * self.experiment.parallel.dp),
        )

    # --- what a callback may use ------------------------------------------------------------------

    def stop(self) -> None:
        """End the run with a checkpoint and a result: after the step that is under way, or else the next."""
        self._stop_wish = True

    def finish(self, reason: str) -> None:
        """End the run after this step as one that is complete; on all ranks together. `run.detail` tells the reason."""
        if self.step < self.experiment.training.steps and not self._complete:
            self._complete, self._reason = True, reason
            self.event("finish", step=self.step, text=reason)

    def log(self, figures: Mapping[str, float | Tensor]) -> None:
        """Add columns to the step's line of `metrics.jsonl`: numbers, or 0-d tensors, for which nothing waits.

        Rank 0's count. Between two steps (from `on_evaluation`, say) they go to the line of the next. ValueError for
        the name of a column that is there already.
        """
        self._meters.log(figures)

    def save_checkpoint(self, *, rolling: bool = True) -> None:
        """Take a checkpoint now, and write it while the training goes on; on all ranks together."""
        self._beat.say("checkpoint")
        self._best_wish = False
        so_far = self._so_far.state_dict(self.step, self._meters, self._strategy.most(self._peak_bytes))
        self._checkpoints.save(self.step, *self._strategy.snapshot(self._adapted, self.optimizer), rolling=rolling,
                               extra={"callbacks": self._callbacks.state_dict(), "so_far": so_far})

    @property
    def _peak_bytes(self) -> int:
        return self._so_far.peak_bytes(self._memory.peak_bytes)

    @property
    def stages(self) -> tuple[dist.ProcessGroup | None, Collection[Tensor]]:
        """Of a pipeline: the group of its ranks, and the parameters of this rank that another one counts."""
        return self._strategy.stages.get("stages"), self._strategy.stages.get("copies", frozenset())

    def trained_parameters(self) -> dict[str, Tensor]:
        """Those of this rank, by their names in the model itself: wrappers lengthen those of `model`."""
        return {name: parameter for name, parameter in self._adapted.named_parameters() if parameter.requires_grad}

    def keep_best(self, monitor: str, board: Board, *, take: bool = True, restore: bool = False) -> None:
        """Keep the checkpoints that `board` names; with `take`, one of this step is among them. With `restore` the run
        ends with the weights of the first. On all ranks together.
        """
        self._best_wish = self._best_wish or take
        self._best = board[0] if restore else self._best
        self._checkpoints.keep_best(monitor, board, tell=not take)

    def _tell_of_checkpoint(self, written: Written) -> None:
        self.event("checkpoint", step=written.step, path=str(written.path.relative_to(self.folder.path)),
                   blocked=written.blocked)
        self._callbacks.on_checkpoint(self, written)

    def event(self, kind: str, **fields: Any) -> None:
        """A line in `events.jsonl`, from rank 0."""
        if self._events:
            self._events.append({"time": time.time(), "kind": kind, **fields})

    def _warn(self, text: str) -> None:
        self.event("warning", text=text)

    # --- before and after -------------------------------------------------------------------------

    def _build(self) -> None:
        """Everything the loop uses, from the cells."""
        experiment, training = self.experiment, self.experiment.training
        self._memory = build_memory(self.device)
        if isinstance(self._memory, NoMemory):
            self._warn(self._memory.reason)
        self._tokenizer = Tokenizer(self.folder.path / "tokenizer")
        self.event("phase", text="loading the model")
        self._strategy = build_strategy(experiment.parallel, self.device, training.precision)
        extension = Extension.of(self.folder.read("data/index.json").get("extension"))
        with model_warnings(self._warn):
            self._step = TrainingStep(experiment, self.device, self._strategy, extension, self._tokenizer,
                                      say=functools.partial(self._beat.say, "step"))
        self.model, self.optimizer, built = self._step.model, self._step.optimizer, self._step.built
        self._causal_lm, self._flops = built.causal_lm, built.flops
        self._adapted: Any = built.root
        self._counts = {"parameters": built.size.parameters, "trainable": built.size.trainable}
        if isinstance(experiment.adapter, AdaLoRA):
            attach_budget(self._adapted, self.optimizer, lambda: self.step)
        # Dropout differs between ranks that see other tokens; tensor-parallel ranks draw alike (`parallel.tensor`).
        seed = training.seed * 1000 + self.rank // experiment.parallel.tp
        torch.manual_seed(seed)
        self._meters = Meters(self.folder if self.rank == 0 else None, self.device,
                              experiment.parallel.world_size, peak_flops(self.device))
        self._build_data()
        self._answers = Answers(self.folder, self.rank, self._tokenizer, self.folder.read("data/index.json")["style"],
                                training.seed)
        layout = experiment.parallel.model_dump(include={"dp", "tp", "pp"})
        self._read = functools.partial(load_checkpoint, layout=layout, seed=seed)
        shared = identity(experiment, self.folder.read("data/index.json")["fingerprint"], self._counts, self.device)
        self._checkpoints = Checkpointer(self.folder.checkpoints, keep=training.keep_checkpoints, layout=layout,
                                         identity=shared, on_written=self._tell_of_checkpoint,
                                         on_refused=self._warn)
        if self.resumed_from is not None:
            check_frozen(self.resumed_from, shared["drawn_on"])
            self.step = self._began_at = self._load(self.resumed_from)
            state = read_json(self.resumed_from / "state.json")
            self._callbacks.load_state_dict(state.get("callbacks", {}))
            self._so_far.load_state_dict(state.get("so_far", {}), self.step, self._meters)
        self.event("start", step=self.step, steps=training.steps, world_size=experiment.parallel.world_size,
                   device=str(self.device.type), **asdict(built.size))

    def _load(self, checkpoint: Path) -> int:
        """Weights, optimizer and random state of a checkpoint; its step."""
        return self._strategy.load(functools.partial(self._read, checkpoint), self._adapted, self.optimizer)

    def _build_data(self) -> None:
        data, training, parallel = self.experiment.data, self.experiment.training, self.experiment.parallel
        folder = self.folder.path / "data"
        self._documents = Documents.load(folder / "train")
        index = self.folder.read("data/index.json")
        self._held_out = [load_questions(folder / name) for name in index["evaluations"]]
        for text in index["warnings"]:
            self._warn(text)
        context = getattr(self._causal_lm.config.get_text_config(), "max_position_embeddings", None)
        self._order = Order(
            self._documents, batch_size=training.batch_size, seed=training.seed, shuffle=data.shuffle,
            micro_batch_size=parallel.micro_batch_size(training.batch_size, training.micro_batch_size),
            dp_rank=self._strategy.place.dp, dp_size=parallel.dp,
            packing=sequence_length(data, room_for_documents(self.experiment, context)) if data.packing else None,
            group_by_length=data.group_by_length,
        )

    def _heed_stop(self) -> bool:
        """Whether somebody wants the end. Who has set the stop flag is told that it was seen, and then waits for the
        step, however long, before it kills.
        """
        if self.rank == 0 and not self._stop_wish and self.folder.stop_flag.exists():
            self._stop_wish = True
            self.event("stopping", step=self.step)
        return self._stop_wish

    def _tick(self) -> None:
        """Between two batches of an evaluation."""
        self._beat.say("evaluation")
        self._heed_stop()

    def _verdict(self, figures: list[StepFigures]) -> str | None:
        """Why the run ends before its last step, or None. All ranks see the same figures."""
        for step in figures:
            if not math.isfinite(step.loss):
                self._reason = f"the loss of step {step.step} is {step.loss}"
                return "diverged"
        if any(step.stop for step in figures) and self.step < self.experiment.training.steps:
            return "stopped"
        return None

    def _due(self, cell: Evaluation) -> bool:
        return cell.every is not None and self.step % cell.every == 0

    def _evaluate(self, due: Callable[[Evaluation], bool], step: int | None = None) -> dict[str, float]:
        """Run the evaluations that are due, but for those whose figures are known; all figures of these weights.

        The weights are those after `step`, by default the current one. Of others callbacks are not told: they have seen
        later ones.
        """
        at = self.step if step is None else step
        known, found = self._so_far.figures.get(at, {}), dict[str, float]()
        for place, (cell, documents) in enumerate(zip(self.experiment.evaluate, self._held_out, strict=True)):
            if due(cell) and place not in known:
                self._so_far.figures[at] = known
                with optim.averaged(self.optimizer):
                    known[place] = evaluate(
                        cell, self._adapted, documents, self._tokenizer, self._strategy, flat=self._step.flat,
                        virtual=self.experiment.virtual, tick=self._tick,
                        keep=functools.partial(self._keep_answers, cell, at))
                self.event("evaluation", step=at, **known[place])
                found |= known[place]
        if found and at == self.step:
            self._callbacks.on_evaluation(self, found)
        return {name: value for figures in known.values() for name, value in figures.items()}

    def _keep_answers(self, cell: Evaluation, step: int, samples: list[dict[str, Any]]) -> None:
        self.folder.evaluations.mkdir(exist_ok=True)
        write_lines(self.folder.evaluations / file_name(cell, step), samples)

    def _answer(self) -> None:
        """Let the model answer what it has been asked."""
        with optim.averaged(self.optimizer):
            self._answers.give(self.step, self._adapted, self._strategy, lambda: self._beat.say("answer"))

    def _finish(self, status: str) -> str:
        """Keep what was trained (checkpoint, model) before anything else can fail; evaluate; write the result."""
        self.event("ending", step=self.step)
        training = self.experiment.training
        if status != "diverged" and not finite_everywhere(self._adapted, self.device):
            status, self._reason = "diverged", f"weights are not finite after step {self.step}"
        if status == "stopped":
            self.save_checkpoint()
        step = self._go_to_best(status)
        if training.export and (status != "diverged" or step != self.step):
            self._beat.say("export")
            self.event("phase", text="writing the model")
            with optim.averaged(self.optimizer):
                export_model(self._adapted, self._tokenizer, self.folder, self._strategy)
        figures = self._evaluate(lambda cell: True, step) if status == "ok" else {}
        if self._best_wish:
            self.save_checkpoint(rolling=False)
            self._checkpoints.finish()
        result = {
            "status": status, "steps": self.step, **self._meters.summary(), **figures,
            **worst_rank(self._peak_bytes, self._held, self.device), "seconds": self._so_far.seconds,
            "world_size": self.experiment.parallel.world_size, **self._counts,
            **({"restored": step} if step != self.step else {}), **ending(status, self._reason, self.folder),
        }
        if self.rank == 0:
            self.folder.write("result.json", result)
        self._callbacks.on_end(self, result)
        self.event("end")
        return status

    def _go_to_best(self, status: str) -> int:
        """At the end, where `BestCheckpoint(restore=True)` wants it, take the best weights; the step that they are of.

        The last ones may be the best: they are judged first, as often as those before were.
        """
        if status == "ok" and any(isinstance(cell, BestCheckpoint) and cell.restore
                                  for cell in self.experiment.callbacks):
            self._evaluate(lambda cell: cell.every is not None)
            if self._best_wish:
                self.save_checkpoint(rolling=False)
        self._checkpoints.finish()
        if self._best is None or self._best["step"] == self.step:
            return self.step
        self.event("phase", text=f"going back to the weights of step {self._best['step']:,}")
        step = self._load(self.folder.checkpoints / self._best["path"])
        if isinstance(self.experiment.adapter, AdaLoRA):
            forget_choice(self._adapted, step)
        return step
