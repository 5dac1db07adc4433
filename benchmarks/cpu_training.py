"""Useful tokens per CPU-second of our training loop beside `transformers.Trainer`, on one CPU thread.

    python benchmarks/cpu_training.py [--quick] [--json FILE] [--models 1m 5m] [--data skills]

Three arms train the same random model (fp32, AdamW, clipping at 1.0, same seed) on the same documents:

- `collie_lab`: the loop that every rank runs, packed, through its own trainer.
- `trainer, packed`: the same sequences in the same batches; positions restart in every document, from which
  transformers builds a block-diagonal mask, so its attention does the same work. Rows are padded to the
  longest of their batch.
- `trainer, padded`: one document a row, padded to the sequence length; what most fine-tuning scripts do.

Only tokens of documents count. What is measured is `time.process_time`, which a busy machine disturbs less
than the clock on the wall; arms take turns, and a repeat's ratio is taken between neighbours in time. Before
anything is timed, the losses of the first steps of the two packed arms are compared: they must agree.
The steps in which our CPU memory meter records (the first two and one probe in a thousand) are left out,
as the loop leaves them out of its own tokens per second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Before torch reads them: one thread, and no words of its profiler between the lines of the report.
os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}

import torch
import transformers
from _results import keep, machine
from transformers import TrainerCallback

from collie_lab.cells import AdamW, Data, Experiment, Instructions, Model, Skills, Training
from collie_lab.data import Documents, prepare
from collie_lab.folder import RunFolder, Tail
from collie_lab.study._peer_rows import Rows, collator
from collie_lab.study._peer_trainer import arguments, build_model, sizes
from collie_lab.training.trainer import Trainer

_ROOT = Path(__file__).resolve().parent.parent
_LEARNING_RATE = 1e-3
_WARM_UP = 3  # steps of every arm that are not timed
_AGREE_STEPS, _AGREE_WITHIN = 5, 1e-4


@dataclass(frozen=True)
class Case:
    """A model and the batches it is trained on."""

    name: str
    model: Model
    batch_size: int
    max_length: int
    steps: int

    def experiment(self, data: Data, steps: int, seed: int, callback: Callable[[Trainer], None]) -> Experiment:
        return Experiment(
            model=self.model, data=data, optimizer=AdamW(lr=_LEARNING_RATE), callbacks=(callback,),
            training=Training(steps=steps, batch_size=self.batch_size, clip_grad_norm=1.0, seed=seed, export=False),
        )


CASES = {
    # Four of the five layers of llama-1m: 0.83 M parameters.
    "1m": Case("1m", Model("llama-1m", init="random", config={"num_hidden_layers": 4}), 4, 512, 30),
    "5m": Case("5m", Model("llama-5m", init="random"), 8, 512, 8),
}


@dataclass
class Clock:
    """CPU-seconds at the end of every step."""

    ends: list[float] = field(default_factory=list)

    def tick(self, *_: Any) -> None:
        """A step has ended."""
        self.ends.append(time.process_time())

    def speed(self, tokens: list[int]) -> float:
        """Tokens per CPU-second, over the steps after the warm-up; `tokens` are those of every step."""
        steps = range(_WARM_UP, len(self.ends))
        seconds = sum(self.ends[step] - self.ends[step - 1] for step in steps)
        return sum(tokens[step] for step in steps) / seconds


# --- our arm --------------------------------------------------------------------------------------


def run_ours(case: Case, data: Data, steps: int, seed: int, folder: Path) -> tuple[float, list[float]]:
    """Tokens per CPU-second and the loss of every step, of the loop that a rank runs."""
    clock = Clock()
    experiment = case.experiment(data, steps, seed, clock.tick)
    run = RunFolder.create(folder, "ours")
    prepare(experiment, run)
    Trainer(experiment, run, torch.device("cpu")).run()
    records = list(Tail(run.path / "metrics.jsonl").new())
    return clock.speed([record["tokens"] for record in records]), [record["loss"] for record in records]


# --- transformers.Trainer -------------------------------------------------------------------------


def run_theirs(case: Case, data: Data, documents: Documents, steps: int, seed: int, folder: Path, *,
               packed: bool) -> tuple[float, list[float]]:
    """The same of `transformers.Trainer`; without packing the speed alone, for its batches are others."""
    experiment = case.experiment(data.replace(packing=packed), steps, seed, lambda _: None)
    clock, log = Clock(), _Losses()
    rows = Rows(experiment, documents, case.max_length)
    settings = arguments(experiment, RunFolder(folder), torch.device("cpu"))
    if steps == _AGREE_STEPS:
        settings.set_logging(strategy="steps", steps=1)
    trainer = transformers.Trainer(
        model=build_model(experiment), args=settings, train_dataset=rows, callbacks=[_Ticks(clock), log],
        data_collator=collator(packed=packed, width=None if packed else case.max_length))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock.speed(rows.tokens), log.losses


class _Ticks(TrainerCallback):  # type: ignore[misc]
    def __init__(self, clock: Clock):
        self._clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._clock.tick()


class _Losses(TrainerCallback):  # type: ignore[misc]
    """The losses that the Trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


# --- the comparison -------------------------------------------------------------------------------

ARMS = ("collie_lab", "trainer, packed", "trainer, padded")


def compare(case: Case, data: Data, repeats: int, folder: Path) -> dict[str, Any]:
    """Check that the packed arms do the same work, then time the arms in turn."""
    source = RunFolder.create(folder, "data")
    prepare(case.experiment(data, 1, 0, lambda _: None), source)
    documents = Documents.load(source.path / "data" / "train")

    def run(arm: str, steps: int, seed: int) -> tuple[float, list[float]]:
        if arm == "collie_lab":
            return run_ours(case, data, steps, seed, folder)
        return run_theirs(case, data, documents, steps, seed, folder, packed=arm == "trainer, packed")

    losses = [run(arm, _AGREE_STEPS, 0)[1] for arm in ARMS[:2]]
    difference = max(abs(ours - theirs) for ours, theirs in zip(*losses, strict=True))
    print(f"\n{case.name}: losses of the first {_AGREE_STEPS} steps differ by at most {difference:.1e}", flush=True)
    if not difference <= _AGREE_WITHIN:
        raise SystemExit(f"the packed arms do not do the same work: {losses}")
    speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for repeat, arm in itertools.product(range(repeats), ARMS):
        speeds[arm].append(run(arm, _WARM_UP + case.steps, repeat)[0])
    ratios = {arm: [ours / theirs for ours, theirs in zip(speeds["collie_lab"], speeds[arm], strict=True)]
              for arm in ARMS[1:]}
    parameters = sizes(case.experiment(data, 1, 0, lambda _: None))[0]["parameters"]
    report(case, parameters, speeds, ratios)
    return {"parameters": parameters, "batch_size": case.batch_size, "max_length": case.max_length,
            "steps": case.steps, "mean_document": float(documents.lengths.mean()), "loss_difference": difference,
            "tokens_per_cpu_second": speeds, "ratios": ratios}


def report(case: Case, parameters: int, speeds: dict[str, list[float]], ratios: dict[str, list[float]]) -> None:
    print(f"{case.name}: {parameters:,} parameters, {case.batch_size} sequences of {case.max_length}, "
          f"{case.steps} steps a repeat; ratio: median (min–max) over {len(speeds[ARMS[0]])} repeats")
    for arm in ARMS:
        line = f"  {arm:16} {statistics.median(speeds[arm]):8,.0f} tokens/CPU-s"
        if arm in ratios:
            found = ratios[arm]
            line += f"   collie_lab is {statistics.median(found):.2f} × ({min(found):.2f}–{max(found):.2f})"
        print(line, flush=True)


def choose_data(kind: str, shared: Path, max_length: int) -> Data:
    """Alpaca's instructions where they are, else the generated skills."""
    file = shared / "data" / "alpaca-subsets" / "random_9k.json"
    if kind == "instructions" or (kind == "auto" and file.is_file()):
        return Instructions(file, packing=True, max_length=max_length, overlong="drop")
    return Skills(packing=True, max_length=max_length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat of few steps: does it run?")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--data", choices=("auto", "instructions", "skills"), default="auto")
    parser.add_argument("--shared", type=Path, default=_ROOT.parent / "shared", help="where data/alpaca-subsets is")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    print(json.dumps(machine(), indent=1))
    results: dict[str, Any] = {}
    for name in options.models:
        case, repeats = CASES[name], options.repeats
        if options.quick:
            case, repeats = replace(case, steps=3), 1
        data = choose_data(options.data, options.shared, case.max_length)
        with tempfile.TemporaryDirectory() as folder:
            results[name] = {"data": data.kind, **compare(case, data, repeats, Path(folder))}
    keep(options.json, f"cpu_training.py --repeats {options.repeats}", results)


if __name__ == "__main__":
    main()
