"""What is wrong with the evaluations of an experiment, and with their files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, Final

from collie_lab.cells import (
    Benchmark,
    CellError,
    Classification,
    Evaluation,
    Experiment,
    Generation,
    HeldOut,
    HumanEval,
    Instructions,
    LMEval,
    MultipleChoice,
    Perplexity,
    Problem,
    Skills,
)
from collie_lab.data.benchmarks import read_questions
from collie_lab.data.hub import context_length
from collie_lab.data.prepare import answer_problem, room_for_documents
from collie_lab.training.metrics import names

__all__ = ["OF_EVERY_RUN", "TAKEN", "evaluation_problems"]

#: Figures that the result of every run has, beside its loss.
OF_EVERY_RUN: Final = ("seconds", "steps", "tokens_per_second", "peak_bytes", "weights_bytes", "gradients_bytes",
                       "optimizer_bytes", "planned_bytes", "parameters", "trainable", "world_size")
#: What stands beside the figures of evaluations: in the result of a run, in its events, and in a study's tables.
TAKEN: Final = frozenset((*OF_EVERY_RUN, "checkpoint", "components", "detail", "kind", "loss", "mfu", "restored",
                          "status", "step", "tgs", "time", "tokens_per_step"))


def evaluation_problems(experiment: Experiment, config: dict[str, Any]) -> Iterator[Problem]:
    """Problems of the evaluations on a model with this configuration; reads the files of those that have their own
    questions."""
    room = room_for_documents(experiment, context_length(config))
    seen: set[tuple[str | None, str]] = set()
    for cell in experiment.evaluate:
        kind = type(cell).__name__
        written = {(cell.name, figure) for figure in _figures(cell)}
        if isinstance(cell, Generation):
            yield from _metrics(cell)
        if written & seen:
            yield Problem(kind, "name", "two evaluations would write the same figures", 'tell them apart: name="..."')
        seen |= written
        for package in _packages(cell):
            if importlib.util.find_spec(package.replace("-", "_").replace("scikit_learn", "sklearn")) is None:
                yield Problem(kind, "", f"it needs {package}, which is not installed", "pip install collie-lab[eval]")
        if isinstance(cell, HeldOut) and not isinstance(cell, Perplexity):
            data = cell.data or experiment.data
            if not isinstance(data, (Instructions, Skills)):
                yield Problem(kind, "data", f"{type(data).__name__} has no prompts to answer",
                              "use Instructions or Skills")
        if isinstance(cell, HumanEval):
            yield from _humaneval(cell)
        if isinstance(cell, (MultipleChoice, Benchmark)):
            try:
                read_questions(cell)
            except CellError as error:
                yield from error.problems
        if (room is None or room >= 2) and (problem := answer_problem(cell, room)):  # else the adapter is to blame
            yield problem


def _figures(cell: Evaluation) -> set[str]:
    """Names that stand for all that an evaluation writes: its kind, or figures that other kinds write too."""
    match cell:
        case Classification() | MultipleChoice():
            return {"accuracy"}
        case Generation():
            return {cell.kind, *_written(cell)}
    return {cell.kind, *(cell.better or {})}


def _written(cell: Generation) -> list[str]:
    """The figures of its metrics, of those that have a name."""
    written: list[str] = []
    for metric in cell.metrics:
        if metric == "bleu":
            written.append(metric)
        elif isinstance(metric, str) or hasattr(metric, "__name__"):
            written += names(metric)
    return written


def _metrics(cell: Generation) -> Iterator[Problem]:
    """Functions without a name, and names that are another figure's."""
    remedy = "def name_of_the_figure(answer, reference): ..."
    for metric in cell.metrics:
        if not isinstance(metric, str) and not hasattr(metric, "__name__"):
            yield Problem("Generation", "metrics", f"a figure goes by its function's name, and {metric!r} has none",
                          remedy)
    written = _written(cell)
    for name in sorted({name for name in written if written.count(name) > 1}):
        yield Problem("Generation", "metrics", f"two metrics would write {name!r}", remedy)
    for name in sorted(TAKEN.intersection(written) if cell.name is None else ()):
        yield Problem("Generation", "metrics", f"{name!r} is a figure of every run",
                      'another name for the function, or Generation(name="...")')


def _packages(cell: Evaluation) -> tuple[str, ...]:
    """What an evaluation wants of the extra `eval`."""
    match cell:
        case Generation():
            wanted = {"bleu": "sacrebleu", "rouge": "rouge-score"}
            return tuple(wanted[name] for name in cell.metrics if isinstance(name, str) and name in wanted)
        case Classification():
            return ("scikit-learn",)
        case LMEval():
            return ("lm-eval",)
    return ()


def _humaneval(cell: HumanEval) -> Iterator[Problem]:
    if max(cell.k) > cell.samples:
        yield Problem("HumanEval", "k", f"pass@{max(cell.k)} of {cell.samples} completions a problem",
                      f"samples={max(cell.k)} or more")
    if cell.samples > 1 and not cell.temperature:
        yield Problem("HumanEval", "samples", f"{cell.samples} greedy completions of a problem are all the same",
                      "set a temperature, as 0.8", level="warning")
    if cell.top_p < 1 and not cell.temperature:
        yield Problem("HumanEval", "top_p", "a greedy completion is not drawn", "set a temperature", level="warning")
    if not cell.execute:
        yield Problem("HumanEval", "execute", "the completions are kept but not run: there will be no pass@k",
                      "execute=True runs what the model has written, each program in a sandbox", level="warning")
