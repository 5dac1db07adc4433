"""The doctor: does *this* model, on *this* machine, train the same under every layout?

Each check is a short real run, in warm ranks, whose losses are compared with those of one process on the same data.
Silent errors of libraries, drivers and model families show here, before they show in a paper.
"""

from __future__ import annotations

import contextlib
import html
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_lab.cells import AdamW, CellError, Experiment, LoRA, Model, Parallel, Perplexity, Problem, Skills, Training
from collie_lab.launch import Pool, RankError, Run
from collie_lab.machine import visible_gpus

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CHECKS", "Diagnosis", "Finding", "doctor"]

_STEPS, _SPLIT = 5, 2  # of every run; the step after which the checkpoint is taken that one of them resumes from
_TOLERANCE, _GPU_TOLERANCE = 1e-5, 1e-4  # GPUs choose other kernels, and so another order of sums, for other shapes


@dataclass(frozen=True)
class Finding:
    """What one check found: `ok`, `wrong`, `failed` or `skipped`; for the last two the reason."""

    check: str
    result: str
    difference: float
    """The largest difference of a loss, or of the held-out likelihood, from that of one process."""
    tolerance: float
    seconds: float
    reason: str = ""


@dataclass
class Diagnosis:
    """The findings as a table. `ok` if nothing is wrong and nothing has failed."""

    what: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every check that could be made was passed."""
        return all(finding.result in ("ok", "skipped") for finding in self.findings)

    @property
    def table(self) -> pd.DataFrame:
        """A row a check."""
        import pandas as pd

        return pd.DataFrame([vars(finding) for finding in self.findings])

    def __repr__(self) -> str:
        return "\n".join([self.what, *(_line(finding) for finding in self.findings)])

    def _repr_html_(self) -> str:
        colours = {"ok": "#009E73", "skipped": "#6b737a", "wrong": "#D55E00", "failed": "#D55E00"}
        rows = "".join(
            f"<tr><td style='text-align:left'>{finding.check}</td>"
            f"<td style='text-align:left;color:{colours[finding.result]}'>{finding.result}</td>"
            f"<td>{_number(finding.difference)}</td><td>{finding.tolerance:g}</td><td>{finding.seconds:.0f}</td>"
            f"<td style='text-align:left'>{html.escape(finding.reason)}</td></tr>" for finding in self.findings)
        head = "".join(f"<th>{name}</th>" for name in ("check", "result", "difference", "tolerance", "seconds", ""))
        return f"<p>{html.escape(self.what)}</p><table><tr>{head}</tr>{rows}</table>"


def doctor(model: Model | str | Path | Experiment, *, ranks: int = 2, checks: Iterable[str] | None = None,
           folder: str | Path | None = None) -> Diagnosis:
    """Compare packing, accumulation, resuming, export and every layout over `ranks` with one process.

    Each is a run of five steps in fp32 on generated instructions. What the model or the machine cannot do is skipped,
    with the reason. `checks` chooses among `CHECKS`; `folder` keeps the runs. An experiment lends model and adapter.

    Raises:
        CellError: an unknown check, or a model that cannot even train in one process.
    """
    chosen = list(CHECKS) if checks is None else list(checks)
    if unknown := [name for name in chosen if name not in CHECKS]:
        raise CellError([Problem("doctor", "checks", f"unknown check {unknown[0]!r}",
                                 "there are: " + ", ".join(CHECKS))])
    base = _base(model, ranks)
    base.check().raise_for_errors()
    runs = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="collie-doctor-"))
    try:
        return _examine(base, ranks, chosen, runs)
    finally:
        if folder is None:
            shutil.rmtree(runs, ignore_errors=True)


def _base(model: Model | str | Path | Experiment, ranks: int) -> Experiment:
    if isinstance(model, Experiment):
        cell, adapter = model.model, model.adapter
    else:
        cell, adapter = model if isinstance(model, Model) else Model(model), None
    return Experiment(
        model=cell, adapter=adapter, name="doctor", optimizer=AdamW(lr=1e-3, weight_decay=0.1),
        data=Skills(size=64 * ranks, test_size=24, packing=True, max_length=96), evaluate=(Perplexity(),),
        training=Training(steps=_STEPS, batch_size=4 * ranks, clip_grad_norm=1.0, export=False),
    )


def _examine(base: Experiment, ranks: int, chosen: list[str], folder: Path) -> Diagnosis:
    diagnosis = Diagnosis(f"{base.model.source} ({base.model.init}), {ranks} ranks, {_STEPS} steps of "
                          f"{base.training.batch_size} packed sequences, fp32")
    print(diagnosis.what)
    began, made = time.monotonic(), 0
    with contextlib.closing(_Launcher(folder)) as launcher:
        for index, name in enumerate(chosen):
            finding = _make(name, base, ranks, launcher)
            diagnosis.findings.append(finding)
            made += finding.result != "skipped"
            left = (time.monotonic() - began) / max(1, made) * (len(chosen) - index - 1)
            print(_line(finding) + (f"   (at most {math.ceil(left)} s left)" if left and made else ""), flush=True)
    return diagnosis


def _make(name: str, base: Experiment, ranks: int, launcher: _Launcher) -> Finding:
    began = time.monotonic()

    def found(result: str, difference: float = math.nan, reason: str = "") -> Finding:
        return Finding(name, result, difference, launcher.tolerance, time.monotonic() - began, reason)

    try:
        difference = max(CHECKS[name](base, ranks, launcher))
    except CellError as error:
        return found("skipped", reason=str(error.problems[0]))
    except RankError as error:
        return found("failed", reason=str(error).strip().splitlines()[-1])
    right = difference <= launcher.tolerance  # NaN is not
    return found("ok" if right else "wrong", difference)


class _Launcher:
    """Runs experiments, the same one once, in a pool for each number of ranks."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pools: dict[int, Pool] = {}
        self._done: dict[str, Run] = {}
        self.tolerance = _GPU_TOLERANCE if visible_gpus() else _TOLERANCE

    def run(self, experiment: Experiment, resume: Path | None = None) -> Run:
        experiment.check().raise_for_errors()
        key = f"{experiment!r} {resume}"
        if key not in self._done:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # options without effect are no news here
                self._done[key] = experiment.launch(show=False, plan=False, folder=self._folder, resume=resume,
                                                    pool=self._pool(experiment.parallel.world_size))
        return self._done[key]

    def _pool(self, ranks: int) -> Pool:
        if ranks not in self._pools:
            self._pools[ranks] = Pool(ranks)
        return self._pools[ranks]

    def close(self) -> None:
        """End all ranks."""
        for pool in self._pools.values():
            pool.close()

    def compare(self, one: Experiment, other: Experiment) -> Iterator[float]:
        """Differences of the losses of all steps, and of the held-out likelihood."""
        yield from _differences(self.run(one), self.run(other))


def _differences(one: Run, other: Run) -> Iterator[float]:
    first, second = one.metrics["loss"], other.metrics["loss"]
    for step in second.index:
        yield _distance(first.get(step, math.nan), second[step])
    yield _distance(one.evaluations["nll"].iloc[-1], other.evaluations["nll"].iloc[-1])


def _distance(one: float, other: float) -> float:
    """NaN, which `max` would pass over, counts as infinitely far."""
    distance = abs(one - other)
    return distance if math.isfinite(distance) else math.inf


# --- the checks -----------------------------------------------------------------------------------


def _variant(path: str, value: Any) -> Callable[..., Iterator[float]]:
    return lambda base, ranks, launcher: launcher.compare(base, base.with_(path, value))


def _layout(make: Callable[[int], Parallel]) -> Callable[..., Iterator[float]]:
    return lambda base, ranks, launcher: launcher.compare(base, base.replace(parallel=make(ranks)))


def _packing(base: Experiment, ranks: int, launcher: _Launcher) -> Iterator[float]:
    """Held-out documents in one row, and each alone."""
    return launcher.compare(base.replace(evaluate=(Perplexity(batch_size=1),)), base)


def _lora(base: Experiment, ranks: int, launcher: _Launcher) -> Iterator[float]:
    adapted = base.replace(adapter=base.adapter or LoRA(r=4))
    return launcher.compare(adapted, adapted.replace(parallel=Parallel(tp=ranks)))


def _resume(base: Experiment, ranks: int, launcher: _Launcher) -> Iterator[float]:
    """Again from a checkpoint in the middle."""
    whole = base.replace(training=base.training.replace(checkpoint_every=_SPLIT, keep_checkpoints=_STEPS))
    run = launcher.run(whole)
    checkpoint = run.folder.checkpoints / f"step-{_SPLIT:06d}"
    return _differences(run, launcher.run(base, resume=checkpoint))


def _export(base: Experiment, ranks: int, launcher: _Launcher) -> Iterator[float]:
    """The exported folder, loaded like any model and hardly trained, predicts as what was exported."""
    run = launcher.run(base.replace(adapter=None).with_("training.export", True))
    again = base.replace(model=Model(run.folder.path / "model"), adapter=None, optimizer=AdamW(lr=1e-12),
                         training=base.training.replace(steps=1))
    yield _distance(run.evaluations["nll"].iloc[-1], launcher.run(again).evaluations["nll"].iloc[-1])


#: What is compared, by name.
CHECKS: Mapping[str, Callable[[Experiment, int, _Launcher], Iterator[float]]] = {
    "packing": _packing,
    "accumulation": _variant("training.micro_batch_size", 1),
    "recompute": _variant("training.recompute", "full"),
    "resume": _resume,
    "export": _export,
    "dp": _layout(lambda ranks: Parallel(dp=ranks)),
    "zero2": _layout(lambda ranks: Parallel(dp=ranks, zero=2)),
    "zero3": _layout(lambda ranks: Parallel(dp=ranks, zero=3)),
    "tp": _layout(lambda ranks: Parallel(tp=ranks)),
    "sequence_parallel": _layout(lambda ranks: Parallel(tp=ranks, sequence_parallel=True)),
    "lora": _lora,
    "pp_gpipe": _layout(lambda ranks: Parallel(pp=ranks, schedule="gpipe")),
    "pp_1f1b": _layout(lambda ranks: Parallel(pp=ranks)),
    "pp_interleaved": _layout(lambda ranks: Parallel(pp=ranks, schedule="interleaved")),
    "pp_zero_bubble": _layout(lambda ranks: Parallel(pp=ranks, schedule="zero_bubble")),
    "deepspeed_1": _layout(lambda ranks: Parallel(dp=ranks, zero=1)),
    "deepspeed_2": _layout(lambda ranks: Parallel(dp=ranks, zero=2, engine="deepspeed")),
    "deepspeed_3": _layout(lambda ranks: Parallel(dp=ranks, zero=3, engine="deepspeed")),
}


def _line(finding: Finding) -> str:
    text = f"  {finding.check:<18} {finding.result:<8} {_number(finding.difference):>8}  {finding.seconds:4.0f} s"
    return text + (f"  {finding.reason}" if finding.reason else "")


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1e}"
