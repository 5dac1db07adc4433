"""How well every optimizer and adapter fine-tunes, on real data, tuned fairly: CLINC150 with a small trained Llama.

    python benchmarks/quality.py --results FILE.jsonl [--model stories260k] [--methods lion lora ...] [--seeds 0 1 2]

The task: name the intent (one of 150) of a request, by greedy generation; exact match. Every method gets one recipe:
the same steps, batches, schedule, clipping (norm 1), no weight decay, and as many learning rates, a factor of about 3
apart (seed 0, judged on requests of the validation split); all else is its cell's default. AdamW trains the adapters.
The best rate then runs with every seed and is judged on twice as many requests of the test split. If the best rate lies
at an end of the grid, the report says so. Every run is a process of its own; a result that is already in the file is
not run again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import collie_lab as lab

_ROOT = Path(__file__).resolve().parents[1]
# Where each grid lies follows from a first look at the validation split; how long it is does not depend on the method.
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "untouched": ({"optimizer": lab.SGD()}, (1e-12,)),
    "adamw": ({"optimizer": lab.AdamW()}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "lion": ({"optimizer": lab.Lion()}, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "adan": ({"optimizer": lab.Adan()}, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "sophia": ({"optimizer": lab.Sophia()}, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
    "sgd": ({"optimizer": lab.SGD(momentum=0.9)}, (1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
    "lomo": ({"optimizer": lab.Lomo()}, (1e-1, 3e-1, 1.0, 3.0, 10.0)),
    "adalomo": ({"optimizer": lab.AdaLomo()}, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "adafactor": ({"optimizer": lab.Adafactor()}, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "muon": ({"optimizer": lab.Muon()}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "lora": ({"optimizer": lab.AdamW(), "adapter": lab.LoRA()}, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "rslora": ({"optimizer": lab.AdamW(), "adapter": lab.LoRA(rslora=True)}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "dora": ({"optimizer": lab.AdamW(), "adapter": lab.LoRA(dora=True)}, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "pissa": ({"optimizer": lab.AdamW(), "adapter": lab.LoRA(init="pissa")}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "lora+": ({"optimizer": lab.AdamW(), "adapter": lab.LoRA(plus=16)}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "qlora": ({"optimizer": lab.AdamW(), "adapter": lab.QLoRA()}, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "adalora": ({"optimizer": lab.AdamW(), "adapter": lab.AdaLoRA()}, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "ia3": ({"optimizer": lab.AdamW(), "adapter": lab.IA3()}, (1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
    "oft": ({"optimizer": lab.AdamW(), "adapter": lab.OFT()}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "prompt": ({"optimizer": lab.AdamW(), "adapter": lab.Prompt()}, (1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
    "p-tuning": ({"optimizer": lab.AdamW(), "adapter": lab.PTuning()}, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "prefix": ({"optimizer": lab.AdamW(), "adapter": lab.Prefix()}, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "last layer": ({"optimizer": lab.AdamW(), "adapter": lab.Freeze(("*.layers.4.*", "*.norm.*"))},
                   (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
}
_file_lock = threading.Lock()


def experiment(method: str, lr: float, seed: int, split: str, data: Path, options: argparse.Namespace
               ) -> lab.Experiment:
    """One arm; all arms differ in what is trained, the optimizer and its learning rate only."""
    cells = METHODS[method][0]
    return lab.Experiment(
        model=lab.Model(options.shared / "models" / options.model),
        data=lab.Instructions(data / f"{split}.json"),
        **{**cells, "optimizer": cells["optimizer"].replace(lr=lr, weight_decay=0.0)},
        training=lab.Training(steps=1 if method == "untouched" else options.steps, batch_size=options.batch_size,
                              schedule="linear", warmup=0.0 if method == "untouched" else 0.03, seed=seed,
                              clip_grad_norm=1.0, export=False),
        evaluate=[lab.ExactMatch(limit=options.limit if split == "val" else 2 * options.limit, max_new_tokens=32,
                                 batch_size=100), lab.Perplexity(limit=500, batch_size=100)],
        name=f"{method.replace(' ', '-')}-{lr:g}-{seed}",
    )


def write_splits(shared: Path, folder: Path) -> None:
    """Two files in CLINC's format: the test split of the first is the validation split."""
    full = json.loads((shared / "data" / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    for split in ("val", "test"):
        (folder / f"{split}.json").write_text(json.dumps({"train": full["train"], "test": full[split]}))


def run_all(arms: Iterable[tuple[str, float, int, str]], data: Path, options: argparse.Namespace,
            done: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """Run what is not done, `jobs` at a time, and append each result to the file."""
    def run(arm: tuple[str, float, int, str]) -> None:
        method, lr, seed, split = arm
        finished = experiment(method, lr, seed, split, data, options).launch(show=False, folder=data / "runs")
        summary = json.loads(finished.summary.to_json())
        row = {"model": options.model, "method": method, "lr": lr, "seed": seed, "split": split, "steps": options.steps,
               "commit": finished.folder.read("env.json")["collie_lab_git"],
               **{key: summary.get(key) for key in (
                   "status", "loss", "exact_match", "perplexity", "trainable", "peak_bytes", "seconds")}}
        with _file_lock:
            done[arm] = row
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, [arm for arm in arms if arm not in done]))


def score(row: dict[str, Any]) -> float:
    """Exact match; a run that diverged found nothing."""
    return row["exact_match"] or 0.0


def rates_of(method: str, options: argparse.Namespace) -> tuple[float, ...]:
    """The learning rates that a method gets: so many from the middle of its grid."""
    rates = METHODS[method][1]
    spare = max(0, len(rates) - options.rates)
    return rates[spare // 2:len(rates) - (spare - spare // 2)]


def best_rate(method: str, done: dict[tuple[Any, ...], dict[str, Any]], options: argparse.Namespace) -> float:
    """The learning rate with the best validation result."""
    return max(rates_of(method, options), key=lambda lr: score(done[method, lr, 0, "val"]))


def report(options: argparse.Namespace, done: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """A Markdown table: mean and standard deviation over the seeds."""
    print("\n| method | trained | peak MB | learning rate | exact match (%) | perplexity | validation, by rate (%) |")
    print("|---|---|---|---|---|---|---|")
    for method in options.methods:
        lr, rates = best_rate(method, done, options), rates_of(method, options)
        rows = [done[method, lr, seed, "test"] for seed in options.seeds]
        matches, perplexities = [100 * score(row) for row in rows], [row["perplexity"] or float("nan") for row in rows]
        spread = f" ± {statistics.stdev(matches):.1f}" if len(rows) > 1 else ""
        trials = " ".join(f"{100 * score(done[method, rate, 0, 'val']):.1f}" for rate in rates)
        edge = " (end of the grid)" if len(rates) > 1 and lr in (rates[0], rates[-1]) else ""
        peak = max(row.get("peak_bytes") or 0 for row in rows) / 1e6
        print(f"| {method} | {rows[0].get('trainable') or 0:,} | {peak:.1f} | {lr:g}{edge} | "
              f"{statistics.mean(matches):.1f}{spread} | {statistics.mean(perplexities):.3f} | {trials} |")


def options_of(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a comparison of methods, with its defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=_ROOT.parent / "shared")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--model", help="a folder of the shared models")
    parser.add_argument("--rates", type=int, help="learning rates that each method gets")
    parser.add_argument("--seeds", nargs="+", type=int)
    for name in ("--steps", "--batch-size", "--limit"):
        parser.add_argument(name, type=int)
    parser.set_defaults(**defaults)
    return parser


def main() -> None:
    """Tune, repeat, report."""
    parser = options_of(__doc__, model="stories260k", rates=5, seeds=[0, 1, 2], steps=900, batch_size=32, limit=500)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    done: dict[tuple[Any, ...], dict[str, Any]] = {}
    if options.results.exists():
        for line in options.results.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["steps"] == options.steps and row.get("model", "stories260k") == options.model:
                done[row["method"], row["lr"], row["seed"], row["split"]] = row
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        write_splits(options.shared, data)
        run_all([(method, lr, 0, "val") for method in options.methods for lr in rates_of(method, options)],
                data, options, done)
        run_all([(method, best_rate(method, done, options), seed, "test") for method in options.methods
                 for seed in options.seeds], data, options, done)
    report(options, done)


if __name__ == "__main__":
    main()
