"""A history in words: the same few sentences for the panel, the terminal, the figures and plain logs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import collie_lab
from collie_lab.view.beats import Trouble
from collie_lab.view.history import Failure, History
from collie_lab.view.units import bytes_text, count_text, duration_text, number_text, percent_text

__all__ = [
    "STATUS_WORDS", "closing_line", "evaluation_text", "facts", "failure_title", "held_out", "is_share",
    "metric_text", "peak_memory", "progress_text", "short_paths", "speed", "time_text", "trouble_texts",
]

#: Every status as people read it.
STATUS_WORDS: Final[Mapping[str, str]] = {
    "starting": "starting", "running": "running", "ok": "ok", "stopped": "stopped", "diverged": "diverged",
    "cuda_oom": "out of GPU memory", "host_oom": "out of host memory", "timeout": "timed out",
    "error": "error", "lost": "lost",
}


#: How the names of figures end that are shares.
_SHARES: Final = ("exact_match", "accuracy", "accuracy_norm", "_macro", "mmlu", "gsm8k", "gsm8k_flexible", "bbh")


def is_share(name: str) -> bool:
    """Whether a figure of this name is a share of one, read as a percentage."""
    return name.endswith(_SHARES)


def metric_text(name: str, value: float | None) -> str:
    """The value of an evaluation's metric."""
    return percent_text(value) if is_share(name) else number_text(value)


def evaluation_text(values: Mapping[str, float]) -> str:
    """The numbers of one evaluation: `perplexity 4.120`, `exact match 31.0% ± 3.2%` (standard error)."""
    return ", ".join(f"{_label(name)} {text}" for name, text in _metric_texts(values).items()) or "no numbers"


def _metric_texts(values: Mapping[str, float]) -> dict[str, str]:
    """The metrics to be read; a `..._se` stands behind its metric, and `nll` says what perplexity says."""
    texts = {}
    for name, value in values.items():
        if name.endswith("_se") or (name == "nll" and "perplexity" in values):
            continue
        error = values.get(f"{name}_se")
        texts[name] = metric_text(name, value) + (f" ± {metric_text(name, error)}" if error is not None else "")
    return texts


def progress_text(history: History) -> str:
    """`step 12/200`, or `step 12` where the end is not known."""
    return f"step {history.step:,}" + (f"/{history.total:,}" if history.total else "")


def facts(history: History) -> dict[str, str]:
    """The few numbers of a run by their labels; those of the finished run where it has written its result."""
    result = history.result
    found: dict[str, str] = {}
    loss = result.get("loss", history.latest("loss"))
    if loss is not None or len(history):
        found["loss"] = number_text(loss)
    found |= held_out(history)
    if speed(history) is not None:
        found["tokens/s"] = count_text(speed(history))
    mfu = history.recent("mfu")
    if mfu is not None:
        found["MFU"] = percent_text(mfu)
    if peak_memory(history) is not None:
        found["peak memory"] = bytes_text(peak_memory(history))
    return found


def held_out(history: History) -> dict[str, str]:
    """The latest value of every metric by its label; those of the finished run where it has written its result."""
    latest = {name: value for item in history.evaluations for name, value in item.values.items()}
    for name in ("perplexity", "exact_match"):
        if history.result.get(name) is not None:
            latest[name] = history.result[name]
    return {_label(name): text for name, text in _metric_texts(latest).items()}


def speed(history: History) -> float | None:
    """Tokens per second: of the whole run where it has ended, else of its latest steps."""
    return history.result.get("tokens_per_second") or history.recent("tokens_per_second")


def peak_memory(history: History) -> float | None:
    """Bytes of the rank that needed most, as far as is known."""
    return history.result.get("peak_bytes") or history.peak("memory_allocated")


def time_text(history: History) -> str:
    """`32 s left`, `3 min 02 s elapsed` where the end cannot be told, or `took 10 min 30 s`."""
    elapsed, remaining = history.elapsed(), history.eta()
    if remaining is not None:
        return f"{duration_text(remaining)} left"
    if elapsed is None:
        return ""
    return f"{duration_text(elapsed)} elapsed" if history.alive else f"took {duration_text(elapsed)}"


def closing_line(history: History) -> str:
    """How it stands, or ended, and with what numbers: the whole run in one line."""
    words = STATUS_WORDS.get(history.status, history.status)
    time = history.elapsed()
    head = f"{words}: {progress_text(history)}" + (f" in {duration_text(time)}" if time is not None else "")
    return ", ".join([head, *(f"{label} {value}" for label, value in facts(history).items())])


def failure_title(failure: Failure) -> str:
    """`ranks 0, 1: ValueError: the message`, the message cut to its first lines."""
    ranks = ", ".join(map(str, failure.ranks))
    message = "\n".join(failure.message.strip().splitlines()[:4])
    return f"rank{'s' * (len(failure.ranks) > 1)} {ranks}: {failure.kind}" + (f": {message}" if message else "")


#: What a traceback's file names begin with: where packages lie, and where a kernel says that its cells do.
_OURS: Final = re.escape(str(Path(collie_lab.__file__).parents[1]))
_PACKAGES: Final = re.compile(rf'(?<=File ")(?:{_OURS}|[^"]*/site-packages)/')
_CELL: Final = re.compile(r'File "[^"]*/ipykernel_\d+/\d+\.py"')


def short_paths(traceback: str) -> str:
    """The same traceback with the files of packages named from the package on, and a notebook's cell by that word."""
    return _PACKAGES.sub("", _CELL.sub("A cell", traceback))


def trouble_texts(troubles: Sequence[Trouble], ranks: int, limit: int = 3) -> list[str]:
    """`rank 3: silent for 45 s in step 12, evaluation`, a line a rank; where all are silent, one line names the first.

    `ranks`: how many there are; beyond `limit` the rest is only counted.
    """
    silent = [item for item in troubles if item.silent]
    if len(silent) == ranks > 1:
        first = silent[0]
        return [f"all {ranks} ranks are silent; the first was rank {first.beat.rank}, "
                f"{duration_text(first.silent)} ago {_place(first)}"]
    texts = [_trouble_text(item) for item in troubles[:limit]]
    more = len(troubles) - limit
    return [*texts, f"and {more} more rank{'s' * (more > 1)}"] if more > 0 else texts


def _trouble_text(trouble: Trouble) -> str:
    if trouble.silent:
        return f"rank {trouble.beat.rank}: silent for {duration_text(trouble.silent)} {_place(trouble)}"
    steps = f"{trouble.behind:,} step{'s' * (trouble.behind > 1)}"
    return f"rank {trouble.beat.rank}: still {_place(trouble)}, {steps} behind the others"


def _place(trouble: Trouble) -> str:
    """Where a rank is: `in step 12`, `in step 12, evaluation`, `while loading`."""
    if trouble.beat.doing == "loading":
        return "while loading"
    return f"in step {trouble.beat.step:,}" + (f", {trouble.beat.doing}" if trouble.beat.doing != "step" else "")


def _label(metric: str) -> str:
    return metric.replace("_", " ")
