"""What every adapter, and full fine-tuning by every optimizer, does for its trained parameters and its memory.

    python benchmarks/adapters.py --results FILE.jsonl [--shared FOLDER] [--methods lora prompt ...] [--for SECONDS]

The methods and learning rates of `quality.py` in one short pass: CLINC150 (name the intent of a request, all 150), a
Llama of 1 M parameters trained on stories letter by letter, one recipe for all. Each method gets the same number of
learning rates; a run is judged on requests of the validation split, by which its rate is chosen, and on others of the
test split, which are reported. `--for` ends between two runs, and what is in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from _results import machine
from quality import METHODS, options_of

import collie_lab as lab
from collie_lab.study import clinc_splits


def rates_of(method: str, options: argparse.Namespace) -> tuple[float, ...]:
    """The learning rates that a method gets: the lowest of its grid, as fits a short training."""
    return METHODS[method][1][:options.rates]


def experiment(method: str, lr: float, seed: int, data: Path, options: argparse.Namespace) -> lab.Experiment:
    """One run; all differ in what is trained, the optimizer and its learning rate only."""
    cells = METHODS[method][0]
    untouched = method == "untouched"

    val, test = (lab.Instructions(data / f"{split}.json") for split in ("val", "test"))
    return lab.Experiment(
        model=lab.Model(options.shared / "models" / options.model),
        data=lab.Instructions(data / "train.json", holdout=0.0),
        **{**cells, "optimizer": cells["optimizer"].replace(lr=lr, weight_decay=0.0)},
        training=lab.Training(steps=1 if untouched else options.steps, batch_size=options.batch_size, seed=seed,
                              schedule="linear", warmup=0.0 if untouched else 0.03, clip_grad_norm=1.0, export=False),
        evaluate=(lab.Perplexity(data=val, limit=options.limit, batch_size=50, name="val"),
                  lab.Perplexity(data=test, limit=options.limit, batch_size=50, name="test"),
                  lab.ExactMatch(data=test, limit=options.limit, batch_size=50, max_new_tokens=32, name="test")),
        name="adapters",
    )


def run(method: str, lr: float, seed: int, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the file. The peak is that of the training steps."""
    finished = experiment(method, lr, seed, data, options).launch(show=False, folder=data / "runs", pool=options.pool)
    summary = json.loads(finished.summary.to_json())
    found = {key: summary.get(key) for key in (
        "status", "loss", "val_perplexity", "test_exact_match", "test_perplexity", "trainable",
        "parameters", "seconds")}
    return {"model": options.model, "method": method, "lr": lr, "seed": seed, "steps": options.steps,
            "batch_size": options.batch_size, **found, "peak_bytes": int(finished.metrics["memory_allocated"].max())}


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A Markdown table of the rate with the lowest validation perplexity."""
    print("\n| method | trained | share (%) | peak MB | learning rate | perplexity | exact match (%) | validation "
          "perplexity, by rate |\n|---|---|---|---|---|---|---|---|")
    for method in options.methods:
        mine = sorted((row for row in rows if row["method"] == method and row["lr"] in rates_of(method, options)
                       and row["steps"] == options.steps), key=lambda row: row["lr"])
        if not mine:
            continue
        best = min(mine, key=lambda row: row["val_perplexity"] or math.inf)
        edge = " (end of the grid)" if len(mine) > 1 and best in (mine[0], mine[-1]) else ""
        trials = " ".join(f"{row['val_perplexity'] or math.inf:.2f}" for row in mine)
        trained = 0 if method == "untouched" else best["trainable"]
        share = 100 * trained / best["parameters"]
        print(f"| {method} | {trained:,} | {share:.2f} | {best['peak_bytes'] / 1e6:.1f} | {best['lr']:g}{edge} | "
              f"{best['test_perplexity']:.3f} | {100 * best['test_exact_match']:.1f} | {trials} |")


def main() -> None:
    """Run what is missing, report all."""
    parser = options_of(__doc__, model="babyllama-1m", rates=3, seeds=[0], steps=200, batch_size=16, limit=200)
    parser.add_argument("--for", type=float, default=math.inf, dest="seconds", help="begin no run after so long")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.results.exists():
        rows = [row for line in options.results.read_text(encoding="utf-8").splitlines() if "method" in (
            row := json.loads(line))]
    else:
        options.results.write_text(json.dumps({"environment": machine()}) + "\n", encoding="utf-8")
    done = {(row["method"], row["lr"], row["seed"], row["steps"]) for row in rows if row["model"] == options.model}
    # All methods' middle rates first: a table that is cut short is fair.
    order = sorted(range(options.rates), key=lambda index: abs(index - options.rates // 2))
    wanted = [(method, rates_of(method, options)[index], seed) for seed in options.seeds for index in order
              for method in options.methods if index < len(rates_of(method, options))]
    wanted = [arm for arm in wanted if (*arm, options.steps) not in done]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, lab.Pool(1) as options.pool:
        data = Path(name)
        clinc_splits(options.shared, data)
        for arm in wanted:
            if time.monotonic() - began > options.seconds:
                break
            rows.append(run(*arm, data, options))
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    report(rows, options)


if __name__ == "__main__":
    main()
