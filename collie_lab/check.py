"""Every conflict between the cells of an experiment, found before anything starts."""

from __future__ import annotations

import html
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from collie_lab.cells import (
    AddedAdapter,
    CellError,
    Experiment,
    HeldOut,
    Instructions,
    Model,
    Problem,
    Text,
    TrainTokenizer,
)
from collie_lab.check_adapter import adapter_problems
from collie_lab.check_callbacks import callback_problems
from collie_lab.check_compile import compile_problems, compiler_problems
from collie_lab.check_deepspeed import deepspeed_problems
from collie_lab.check_evaluation import evaluation_problems
from collie_lab.check_optimizer import matrix_problems, optimizer_problems
from collie_lab.check_parallel import parallel_problems
from collie_lab.check_patterns import pattern_problems
from collie_lab.check_tokenizer import tokenizer_problems
from collie_lab.data.hub import context_length, holds_weights, model_config, weights_digest
from collie_lab.data.prepare import room_for_documents
from collie_lab.data.records import Corpus
from collie_lab.data.sources import unused_separator
from collie_lab.data.tokenizer import save_tokenizer
from collie_lab.folder import read_json
from collie_lab.machine import visible_gpus

__all__ = ["Report", "check", "check_cells", "check_resume", "identity"]


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


def check(experiment: Experiment, known: dict[str, list[Problem]] | None = None) -> Report:
    """All problems of an experiment; reads its model's configuration and its data, starts nothing of a run.

    `known` keeps what takes long to find out: of experiments that are given the same, records are read once.
    """
    known = {} if known is None else known
    problems: list[Problem] = []
    config = _cells(experiment, problems)
    problems += _once(known, ("matrices", experiment.model, experiment.adapter, experiment.optimizer.kind),
                      lambda: matrix_problems(experiment))
    problems += [*_gpus(experiment), *compiler_problems(experiment)]
    _collect(problems, lambda: _data(experiment, config, problems, known))
    return Report(problems)


def check_cells(experiment: Experiment) -> Report:
    """The conflicts between cells alone: as `check`, with no look at weights, data or the GPUs of this machine."""
    problems: list[Problem] = []
    _cells(experiment, problems)
    return Report(problems)


def _cells(experiment: Experiment, problems: list[Problem]) -> dict[str, Any]:
    """Find conflicts between cells; the model's configuration."""
    config: dict[str, Any] = _collect(problems, lambda: _model(experiment.model, problems)) or {}
    problems += [*_batches(experiment), *tokenizer_problems(experiment, config), *optimizer_problems(experiment),
                 *adapter_problems(experiment, config), *parallel_problems(experiment, config),
                 *deepspeed_problems(experiment), *evaluation_problems(experiment, config),
                 *callback_problems(experiment), *pattern_problems(experiment),
                 *compile_problems(experiment, config), *_without_effect(experiment)]
    return config


#: Fields of adapters that say how it is trained, or where its first values came from.
_OF_TRAINING: Final = ("load", "dropout", "plus")


def identity(experiment: Experiment, fingerprint: str) -> dict[str, Any]:
    """What a run and the one that it goes on from have in common: the optimizer, the course of the data, and what is
    not trained."""
    training, data, adapter = experiment.training, experiment.data, experiment.adapter
    course = {"optimizer": experiment.optimizer.kind, "batch_size": training.batch_size, "seed": training.seed,
              "data": fingerprint, "shuffle": data.shuffle, "group_by_length": data.group_by_length,
              "packing": data.packing and (data.max_length or True)}
    if adapter is None:
        return {**course, "adapter": None}
    # A checkpoint holds what is trained; the rest of the function is the adapter's, and the frozen weights'.
    fields = {name: value for name, value in adapter.to_dict().items() if name not in _OF_TRAINING}
    return {**course, "adapter": fields, "frozen_weights": weights_digest(experiment.model)}


def check_resume(experiment: Experiment, fingerprint: str, checkpoint: Path) -> None:
    """Whether a run can go on from a checkpoint exactly as the one that wrote it would have.

    Raises:
        CellError: another optimizer, batch size, seed, data or order of them, adapter or frozen weights; or the
            checkpoint is already at the last step.
    """
    state = read_json(checkpoint / "state.json")
    training = experiment.training
    now = identity(experiment, fingerprint)
    adapter = experiment.adapter
    other = f"{type(adapter).__name__}(load=run.model_path)" if isinstance(adapter, AddedAdapter) \
        else "Model(run.model_path)"
    problems = [Problem("launch", "resume", f"{name} was {then!r} in {checkpoint}, and is {now[name]!r}",
                        f"resume goes on with the same run; to start from its weights: {other}")
                for name, then in state.get("identity", {}).items() if name in now and then != now[name]]
    if state.get("step", 0) >= training.steps:
        problems.append(Problem("launch", "resume", f"{checkpoint} is at step {state['step']} of {training.steps}",
                                "raise Training.steps to train on"))
    if problems:
        raise CellError(problems)


def _collect(problems: list[Problem], action: Any) -> Any:
    """The action's result; a CellError becomes problems."""
    try:
        return action()
    except CellError as error:
        problems += error.problems
        return None


def _once(known: dict[str, list[Problem]], of: tuple[Any, ...],
          find: Callable[[], Iterable[Problem] | None]) -> list[Problem]:
    """The problems that are found, or raised, of these cells; the search is made once."""
    if (key := repr(of)) not in known:
        known[key] = []
        _collect(known[key], lambda: known[key].extend(find() or ()))
    return known[key]


def _model(model: Model, problems: list[Problem]) -> dict[str, Any]:
    if model.init == "pretrained" and model.is_shape:
        problems.append(Problem("Model", "init", f"{model.source} is a named shape and has no trained weights",
                                f'Model("{model.source}", init="random")'))
    elif model.init == "pretrained" and not holds_weights(model):
        problems.append(Problem("Model", "source", f"{model.source} holds no weights",
                                'a folder that save_pretrained wrote; or init="random"'))
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


def _without_effect(experiment: Experiment) -> Iterator[Problem]:
    def warning(cell: str, field: str, message: str, remedy: str = "") -> Problem:
        return Problem(cell, field, message, remedy, level="warning")

    training, data = experiment.training, experiment.data
    if data.packing and data.group_by_length:
        yield warning(type(data).__name__, "group_by_length", "packed sequences are all of a length", "leave it out")
    if training.schedule == "constant" and training.final_lr:
        yield warning("Training", "final_lr", "a constant schedule never falls", "schedule='linear', 'cosine' or 'wsd'")
    if training.schedule != "wsd" and training.decay != type(training).model_fields["decay"].default:
        yield warning("Training", "decay", "only `wsd` has a decay of its own", "schedule='wsd'")
    if training.checkpoint_every and training.checkpoint_every > training.steps:
        yield warning("Training", "checkpoint_every", f"no checkpoint within {training.steps} steps")
    for cell in experiment.evaluate:
        if cell.every and cell.every > training.steps:
            yield warning(type(cell).__name__, "every", f"only at the end: there are {training.steps} steps")


def _gpus(experiment: Experiment) -> Iterator[Problem]:
    """More ranks than GPUs, where there are any; known without torch."""
    gpus = len(visible_gpus())
    if gpus and experiment.parallel.world_size > gpus:
        yield Problem("Parallel", "dp", f"{experiment.parallel.world_size} ranks, but there are {gpus} GPUs",
                      "one rank a GPU; CUDA_VISIBLE_DEVICES='' hides them, for a run on CPU cores")


def _data(experiment: Experiment, config: dict[str, Any], problems: list[Problem],
          known: dict[str, list[Problem]]) -> None:
    context = context_length(config)
    room = room_for_documents(experiment, context)
    taken = f" beside {experiment.virtual.tokens} virtual tokens" if experiment.virtual is not None else ""
    cells = [experiment.data, *(cell.data for cell in experiment.evaluate
                                if isinstance(cell, HeldOut) and cell.data is not None)]
    problems += [Problem(type(cell).__name__, "max_length", f"{cell.max_length} tokens do not fit the model's context "
                         f"of {context}{taken}", f"at most {room}")
                 for cell in cells if room is not None and room >= 2 and (cell.max_length or 0) > room]
    model = experiment.model if config else None
    for cell in cells:
        if isinstance(cell, (Instructions, Text)):  # every record is looked at
            problems += _once(known, ("records", cell, model), partial(_records, cell, model))


def _records(cell: Instructions | Text, model: Model | None) -> Iterator[Problem]:
    """Find, or raise, what is wrong with the records, or with the template of a model's tokenizer, by which the first
    chat is rendered; `prepare` renders all."""
    corpus = Corpus(cell)
    corpus.read_all()
    if isinstance(cell, Text) and (reason := unused_separator(cell)):
        yield Problem("Text", "separator", *reason, level="warning")
    if model is None or isinstance(cell, Text) or isinstance(model.tokenizer, TrainTokenizer):
        return
    if corpus.first().style == "headed":
        base = model if isinstance(model.tokenizer, str) else model.replace(tokenizer=None)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = save_tokenizer(base, Path(folder))
            if tokenizer.chat_template:
                corpus.first(tokenizer.render_chat)
