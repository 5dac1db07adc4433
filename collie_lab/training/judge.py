"""What an evaluation makes of answers: a score for every sample, and figures over all of them.

A sample is what one line of the raw answers says: `index`, the answer or the log-likelihoods of the choices, the
reference, and scores under the names of their figures.
"""

from __future__ import annotations

import contextlib
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from collie_lab import sandbox
from collie_lab.cells import (
    BBH,
    GSM8K,
    MMLU,
    CellError,
    Classification,
    Evaluation,
    ExactMatch,
    Generation,
    HumanEval,
    MultipleChoice,
    Perplexity,
    Problem,
)
from collie_lab.data.questions import Question
from collie_lab.training import metrics

__all__ = ["Sample", "choose", "judge", "summarize"]

Sample = dict[str, Any]

_FLEXIBLE: Final = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
"""A number; the last of an answer is taken, as by lm-eval's filter `flexible-extract`."""


# --- of one sample --------------------------------------------------------------------------------


def choose(cell: Evaluation, item: Question, likelihoods: NDArray[np.float64], greedy: NDArray[np.bool_],
           tokens: NDArray[np.int64]) -> Sample:
    """A sample from the log-likelihood of each choice, whether it is greedy decoding's, and its number of tokens."""
    found = {"loglikelihoods": likelihoods.tolist(), "greedy": greedy.tolist(), "tokens": tokens.tolist()}
    if isinstance(cell, Perplexity):
        return {"nll": -float(likelihoods[0]), "tokens": int(tokens[0])}
    best, right = int(np.argmax(likelihoods)), int(item.reference)
    texts = [choice.removeprefix(" ") for choice in item.choices]  # the blank after the prompt is no part of a choice
    sample = {**_group(item), "choices": texts, **found, "answer": texts[best], "reference": texts[right]}
    match cell:
        case MMLU():
            return {**sample, "mmlu": float(best == right)}
        case Classification():
            return {**sample, "accuracy": float(best == right)}
        case MultipleChoice():
            sizes = {"characters": [len(text) for text in texts], "bytes": [len(text.encode()) for text in texts],
                     "tokens": tokens.tolist()}[cell.normalize]
            best_norm = int(np.argmax(likelihoods / np.array(sizes)))
            return {**sample, "answer_norm": texts[best_norm], "accuracy": float(best == right),
                    "accuracy_norm": float(best_norm == right)}
        case _:
            raise TypeError(f"the cell {type(cell).__name__} has no choices")


def judge(cell: Evaluation, items: Sequence[Question], answers: Sequence[str], tick: Callable[[], None]
          ) -> list[Sample]:
    """A sample from each answer."""
    if isinstance(cell, HumanEval):
        return _programs(cell, items, answers, tick)
    judged = []
    for item, answer in zip(items, answers, strict=True):
        judged.append({**_group(item), "answer": answer, "reference": item.reference,
                       **_scores(cell, answer, str(item.reference))})
    return judged


def _group(item: Question) -> Sample:
    return {"group": item.group} if item.group else {}


def _scores(cell: Evaluation, answer: str, reference: str) -> dict[str, float]:
    equal = float(answer.strip() == reference.strip())
    match cell:
        case ExactMatch():
            return {"exact_match": _own(cell, "score", cell.score, answer, reference) if cell.score else equal}
        case Generation():
            scores: dict[str, float] = {}
            for metric in cell.metrics:
                scores |= ({metric.__name__: _own(cell, "metrics", metric, answer, reference)} if callable(metric)
                           else metrics.of_answer(metric, answer, reference))
            return scores
        case Classification():
            return {"accuracy": equal}
        case GSM8K():
            strict = re.search(r"#### (-?[0-9.,]+)", answer)
            numbers = ["".join(parts) for parts in _FLEXIBLE.findall(answer)]
            right = _number(reference.rpartition("#### ")[2])
            return {"gsm8k": float(strict is not None and _number(strict[1]) == right),
                    "gsm8k_flexible": float(bool(numbers) and _number(numbers[-1]) == right)}
        case BBH():
            if cell.style == "cot":
                # As in lm-eval: to the end of the line but for its last character, the full stop.
                said = re.search(r"(?<=the answer is )(.*)(?=.)", answer)
                equal = float(said is not None and said[1].strip() == reference)
            return {"bbh": equal}
        case _:
            raise TypeError(f"no judge for the cell {type(cell).__name__}")


def _own(cell: Evaluation, field: str, function: Callable[[str, str], float], answer: str, reference: str) -> float:
    """The score of a function of the user's.

    Raises:
        CellError: it is no finite number, of which no mean could be made.
    """
    found = function(answer, reference)
    score = math.nan
    if not isinstance(found, (str, bytes)):  # text that reads as a number is a mistake too
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            score = float(found)
    if math.isfinite(score):
        return score
    name = getattr(function, "__name__", "the function")
    raise CellError([Problem(type(cell).__name__, field, f"{name} gave {found!r:.40} for the answer {answer!r:.80} to "
                             f"{reference!r:.80}", "a score is a finite number, as 0.0 for a wrong answer and 1.0 for "
                             "a right one")])


def _number(text: str) -> str:
    """Without thousands separators, the currency and a full stop, as lm-eval compares them."""
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", text.strip())).lower()


def _programs(cell: HumanEval, items: Sequence[Question], answers: Sequence[str], tick: Callable[[], None]
              ) -> list[Sample]:
    samples: list[Sample] = [{"group": item.group, "sample": int(item.fields["sample"]), "answer": answer}
                             for item, answer in zip(items, answers, strict=True)]
    if not cell.execute:
        return samples
    programs = [f"{item.fields['prompt']}{answer}\n{item.fields['test']}\ncheck({item.fields['entry_point']})\n"
                for item, answer in zip(items, answers, strict=True)]
    outcomes = sandbox.run_all(programs, seconds=cell.seconds, memory=int(cell.memory * 2**30), tick=tick)
    return [{**sample, "passed": float(outcome == "passed"), "outcome": outcome}
            for sample, outcome in zip(samples, outcomes, strict=True)]


# --- over all samples -----------------------------------------------------------------------------


def summarize(cell: Evaluation, samples: Sequence[Sample]) -> dict[str, float]:
    """The figures of all samples, each with its standard error where there is one."""
    match cell:
        case Perplexity():
            return _perplexity(samples)
        case HumanEval():
            return _pass_at_k(cell, samples)
        case Classification():
            labels = cell.labels or tuple(sorted({sample["reference"] for sample in samples}))
            pairs = [(sample["reference"].strip(), sample["answer"].strip()) for sample in samples]
            return {**_means(samples, ["accuracy"]), **metrics.f1_macro(pairs, [label.strip() for label in labels])}
        case MMLU() | BBH():
            return {**_means(samples, [cell.kind]), f"{cell.kind}_macro": _macro(samples, cell.kind)}
        case Generation():
            names = [name for metric in cell.metrics for name in metrics.names(metric)]
            found = _means(samples, names)
            if "bleu" in cell.metrics:
                found |= metrics.bleu([sample["answer"] for sample in samples],
                                      [sample["reference"] for sample in samples])
            return found
        case GSM8K():
            return _means(samples, ["gsm8k", "gsm8k_flexible"])
        case MultipleChoice():
            return _means(samples, ["accuracy", "accuracy_norm"])
        case _:
            return _means(samples, ["exact_match"])


def _means(samples: Sequence[Sample], names: Sequence[str]) -> dict[str, float]:
    """The mean of each score, and its standard error over the samples."""
    found: dict[str, float] = {}
    for name in names:
        values = [float(sample[name]) for sample in samples]
        found |= {name: statistics.fmean(values), f"{name}_se": _standard_error(values)}
    return found


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _macro(samples: Sequence[Sample], name: str) -> float:
    """The mean over groups of each group's mean."""
    groups: dict[str, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample["group"], []).append(sample[name])
    return statistics.fmean(statistics.fmean(values) for values in groups.values())


def _perplexity(samples: Sequence[Sample]) -> dict[str, float]:
    """exp of the mean negative log-likelihood (`nll`, nats) per predicted token, and `bits_per_byte` of their text.

    The latter compares models with different tokenizers (Gao et al., arXiv 2101.00027, section 3.1). An end mark that
    is predicted costs bits and has no bytes. Standard errors are those of a ratio of two sums over documents (Cochran,
    Sampling Techniques, 1977, section 2.11).
    """
    nll, tokens = (np.array([sample[name] for sample in samples], dtype=np.float64) for name in ("nll", "tokens"))
    mean, count = float(nll.sum() / tokens.sum()), len(samples)
    spread = float(np.square(nll - mean * tokens).sum()) * count / max(1, count - 1)
    error, perplexity = math.sqrt(spread) / float(tokens.sum()), math.exp(min(mean, 700.0))
    figures = {"perplexity": perplexity, "perplexity_se": perplexity * error, "nll": mean, "nll_se": error}
    size = sum(sample.get("bytes", 0) for sample in samples)
    return {**figures, "bits_per_byte": float(nll.sum()) / math.log(2) / size} if size else figures


def _pass_at_k(cell: HumanEval, samples: Sequence[Sample]) -> dict[str, float]:
    """1 − C(n − c, k) / C(n, k) for c right ones among n completions of a problem, and its mean over problems
    (Chen et al., arXiv 2107.03374, equation 1)."""
    if not cell.execute:
        return {}
    right: dict[str, float] = {}
    for sample in samples:
        right[sample["group"]] = right.get(sample["group"], 0.0) + sample["passed"]
    found: dict[str, float] = {}
    for k in cell.k:
        estimates = [{"": 1 - math.comb(cell.samples - int(count), k) / math.comb(cell.samples, k)}
                     for count in right.values()]
        found |= {f"humaneval_pass_at_{k}{suffix}": value
                  for suffix, value in zip(("", "_se"), _means(estimates, [""]).values(), strict=True)}
    return found
