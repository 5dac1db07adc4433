"""A history in words: the same few sentences for the panel, the terminal, the figures and plain logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from collie_lab.view.history import Failure, History
from collie_lab.view.units import bytes_text, count_text, duration_text, number_text, percent_text

__all__ = ["STATUS_WORDS", "closing_line", "evaluation_text", "facts", "failure_title", "metric_text", "progress_text"]

#: Every status as people read it.
STATUS_WORDS: Final[Mapping[str, str]] = {
    "starting": "starting", "running": "running", "ok": "ok", "stopped": "stopped", "diverged": "diverged",
    "cuda_oom": "out of GPU memory", "host_oom": "out of host memory", "timeout": "timed out",
    "error": "error", "lost": "lost",
}


def metric_text(name: str, value: float | None) -> str:
    """The value of an evaluation's metric."""
    return percent_text(value) if name == "exact_match" else number_text(value)


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
    latest = {name: value for item in history.evaluations for name, value in item.values.items()}
    for name in ("perplexity", "exact_match"):
        if result.get(name) is not None:
            latest[name] = result[name]
    found |= {_label(name): text for name, text in _metric_texts(latest).items()}
    speed = result.get("tokens_per_second") or history.recent("tokens_per_second")
    if speed is not None:
        found["tokens/s"] = count_text(speed)
    mfu = history.recent("mfu")
    if mfu is not None:
        found["MFU"] = percent_text(mfu)
    memory = result.get("peak_bytes") or history.peak("memory_allocated")
    if memory is not None:
        found["peak memory"] = bytes_text(memory)
    return found


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


def _label(metric: str) -> str:
    return metric.replace("_", " ")
