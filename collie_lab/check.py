"""Every conflict between the cells of an experiment, found before anything starts."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collie_lab.cells import CellError, ExactMatch, Experiment, Instructions, Model, Problem, Skills
from collie_lab.data.hub import context_length, model_config
from collie_lab.data.records import read_documents

__all__ = ["Report", "check"]


class Report:
    """What `check` found: errors, which keep a run from starting, and warnings."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems

    @property
    def errors(self) -> list[Problem]:
        """The problems that keep the experiment from starting."""
        return [problem for problem in self.problems if problem.level == "error"]

    @property
    def warnings(self) -> list[Problem]:
        """Options without effect, and the like."""
        return [problem for problem in self.problems if problem.level == "warning"]

    @property
    def ok(self) -> bool:
        """Whether the experiment can start."""
        return not self.errors

    def raise_for_errors(self) -> None:
        """Raise all errors as one CellError; do nothing where there are none."""
        if self.errors:
            raise CellError(self.errors)

    def __repr__(self) -> str:
        if not self.problems:
            return "no problems"
        return "\n".join(f"{problem.level}: {problem}" for problem in self.problems)

    def _repr_html_(self) -> str:
        if not self.problems:
            return "<span style='color:#009E73'>✓</span> no problems"
        rows = "".join(
            f"<tr><td style='color:{'#D55E00' if problem.level == 'error' else '#E69F00'}'>{problem.level}</td>"
            + "".join(f"<td style='text-align:left'>{html.escape(text)}</td>" for text in
                      (f"{problem.cell}.{problem.field}".rstrip("."), problem.message, problem.remedy)) + "</tr>"
            for problem in self.problems)
        return f"<table><tr><th></th><th>field</th><th>problem</th><th>remedy</th></tr>{rows}</table>"


def check(experiment: Experiment) -> Report:
    """All problems of an experiment; reads its model's configuration and its data, starts nothing."""
    problems: list[Problem] = []
    config = _collect(problems, lambda: _model(experiment.model, problems))
    problems += [*_batches(experiment), *_optimizer(experiment), *_without_effect(experiment), *_gpus(experiment)]
    _collect(problems, lambda: _data(experiment, config or {}, problems))
    return Report(problems)


def _collect(problems: list[Problem], action: Any) -> Any:
    """The action's result; a CellError becomes problems."""
    try:
        return action()
    except CellError as error:
        problems += error.problems
        return None


def _model(model: Model, problems: list[Problem]) -> dict[str, Any]:
    if model.is_shape and model.init == "pretrained":
        problems.append(Problem("Model", "init", f"{model.source} is a named shape and has no trained weights",
                                f'Model("{model.source}", init="random")'))
    if model.config and model.init == "pretrained":
        problems.append(Problem("Model", "config", "trained weights belong to their own configuration",
                                'override fields only with init="random"'))
    return model_config(model)


def _batches(experiment: Experiment) -> Iterator[Problem]:
    training, dp = experiment.training, experiment.parallel.dp
    if training.batch_size % dp:
        yield Problem("Training", "batch_size", f"{training.batch_size} sequences cannot be shared equally by {dp} "
                      "data-parallel ranks", f"a multiple of {dp}, or `Parallel(dp=...)` that divides it")
        return
    share, micro = training.batch_size // dp, training.micro_batch_size
    if micro is not None and (micro > share or share % micro):
        yield Problem("Training", "micro_batch_size", f"{micro} does not divide the {share} sequences of a rank",
                      f"a divisor of {share}, or leave it out")
    if training.warmup_steps >= training.steps:
        yield Problem("Training", "warmup", f"{training.warmup_steps} steps of warm-up, but only {training.steps} "
                      "steps in all", "shorten it, or train longer")


def _optimizer(experiment: Experiment) -> Iterator[Problem]:
    training, name = experiment.training, type(experiment.optimizer).__name__
    if not experiment.optimizer.in_backward:
        return
    share = training.batch_size // experiment.parallel.dp
    if training.micro_batch_size not in (None, share):
        yield Problem("Training", "micro_batch_size", f"{name} updates in the backward pass and cannot accumulate "
                      "gradients over micro-batches", f"leave it out, or set it to a rank's whole share, {share}")
    if training.clip_grad_norm is not None:
        yield Problem("Training", "clip_grad_norm", f"{name} frees each gradient before the global norm is known",
                      "leave it out, or use SGD")


def _without_effect(experiment: Experiment) -> Iterator[Problem]:
    def warning(cell: str, field: str, message: str, remedy: str = "") -> Problem:
        return Problem(cell, field, message, remedy, level="warning")

    training, parallel = experiment.training, experiment.parallel
    if parallel.zero and parallel.dp == 1:
        yield warning("Parallel", "zero", "nothing to shard on one rank", "set `dp` too, or leave it out")
    if training.schedule == "constant" and training.final_lr:
        yield warning("Training", "final_lr", "a constant schedule never falls", "schedule='linear' or 'cosine'")
    if training.checkpoint_every and training.checkpoint_every > training.steps:
        yield warning("Training", "checkpoint_every", f"no checkpoint within {training.steps} steps")
    for cell in experiment.evaluate:
        if cell.every and cell.every > training.steps:
            yield warning(type(cell).__name__, "every", f"only at the end: there are {training.steps} steps")


def _gpus(experiment: Experiment) -> Iterator[Problem]:
    """More ranks than GPUs, where there are any; known without torch."""
    folder = Path("/proc/driver/nvidia/gpus")
    gpus = len(list(folder.iterdir())) if folder.is_dir() else 0
    if gpus and experiment.parallel.world_size > gpus:
        yield Problem("Parallel", "dp", f"{experiment.parallel.world_size} ranks, but this machine has {gpus} GPUs",
                      "one rank a GPU")


def _data(experiment: Experiment, config: dict[str, Any], problems: list[Problem]) -> None:
    context = context_length(config)
    cells = [experiment.data, *(cell.data for cell in experiment.evaluate if cell.data is not None)]
    problems += [Problem(type(cell).__name__, "max_length", f"{cell.max_length} tokens do not fit the model's context "
                         f"of {context}", f"at most {context}")
                 for cell in cells if context is not None and (cell.max_length or 0) > context]
    for evaluation in experiment.evaluate:
        data = evaluation.data or experiment.data
        if isinstance(evaluation, ExactMatch) and not isinstance(data, (Instructions, Skills)):
            problems.append(Problem("ExactMatch", "data", f"{type(data).__name__} has no prompts to answer",
                                    "use Instructions or Skills"))
    for cell in cells:
        if isinstance(cell, Instructions):  # every record is looked at
            _collect(problems, lambda cell=cell: read_documents(cell, "train"))
        elif cell.kind == "text":
            _collect(problems, lambda cell=cell: read_documents(cell, "all"))
