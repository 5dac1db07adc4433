"""What pre-training and further pre-training reach in CPU minutes, in bits per byte of held-out text.

    python benchmarks/pretraining.py --results FILE.json [--tasks scratch further] [--steps 100]

`scratch`: a Llama of 1 M parameters from random weights on 1.4 MB of TinyStories, with the byte tokenizer and with
tokenizers trained on the stories; beside them stories260k, which was trained on all of TinyStories. `further`:
stories260k on WikiText-2 with its own tokenizer and with one extended by the text, the new rows begun in two ways.
Within a task all arms share one recipe and take the same steps of as many tokens, so about the same computation: a
tokenizer of longer tokens sees more text in them. An arm with no steps is what was there to begin with. Every run is a
process of its own; nothing is tuned. Rows of other tasks that the file holds already are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from _results import keep

import collie_lab as lab

_ROOT = Path(__file__).resolve().parents[1]
_LENGTH = 256
#: Bytes of held-out text.
_HELD_OUT = 150_000


def arms(task: str, shared: Path) -> dict[str, lab.Model]:
    """The models of a task."""
    stories = shared / "models" / "stories260k"
    if task == "scratch":
        return {"stories260k, untouched": lab.Model(stories), "bytes": lab.Model("llama-1m", init="random"), **{
            f"BPE {size}": lab.Model("llama-1m", init="random", tokenizer=lab.TrainTokenizer(vocab_size=size))
            for size in (1024, 2048)}}
    models = {"own tokenizer": lab.Model(stories), **{
        f"512 new tokens, {rows}": lab.Model(stories, tokenizer=lab.ExtendTokenizer(learn=512, rows=rows))
        for rows in ("pieces", "mean")}}  # type: ignore[arg-type]
    return models | {f"{name}, untouched": model for name, model in models.items()}


def experiment(model: lab.Model, task: str, steps: int, held_out: Path, shared: Path) -> lab.Experiment:
    """One arm; all of a task differ in the model alone."""
    source = shared / "data" / ("tinystories/train_10k_lines.txt" if task == "scratch" else "wikitext-2/valid.txt")
    separator = "<|endoftext|>" if task == "scratch" else None
    return lab.Experiment(
        model=model,
        data=lab.Text(source, separator=separator, max_length=_LENGTH, packing=True, holdout=0.0),
        optimizer=lab.AdamW(lr=(3e-3 if task == "scratch" else 1e-3) if steps else 1e-12, betas=(0.9, 0.95),
                            weight_decay=0.1),
        training=lab.Training(steps=steps or 1, batch_size=8, schedule="cosine", warmup=0.1 if steps else 0,
                              final_lr=0.1, clip_grad_norm=1.0, export=False),
        evaluate=[lab.Perplexity(data=lab.Text(held_out, max_length=_LENGTH), batch_size=64)],
        name="pretraining",
    )


def run_task(task: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every arm."""
    test = options.shared / "data" / ("tinystories/val.txt" if task == "scratch" else "wikitext-2/test.txt")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        held_out = Path(folder) / "held_out.txt"
        held_out.write_bytes(test.read_bytes()[:_HELD_OUT].rpartition(b" ")[0])  # no character in two
        for name, model in arms(task, options.shared).items():
            steps = 0 if "untouched" in name else options.steps
            cell = experiment(model, task, steps, held_out, options.shared)
            run = cell.launch(show=False, folder=Path(folder) / "runs", env={"OMP_NUM_THREADS": "1"})
            result, summary = run.folder.read("result.json"), run.folder.read("data/index.json")["summary"]
            rows.append({"task": task, "arm": name, "steps": steps, "text_tokens": summary["Text, train"]["tokens"],
                         **{key: result[key] for key in ("parameters", "bits_per_byte", "nll", "seconds")},
                         "tokens_per_second": result["tokens_per_second"] if steps else None})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """A Markdown table."""
    print("\n| task | arm | steps | parameters | tokens of the training text | bits per byte | seconds |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['task']} | {row['arm']} | {row['steps']} | {row['parameters']:,} | {row['text_tokens']:,} | "
              f"{row['bits_per_byte']:.3f} | {row['seconds']:.0f} |")


def main() -> None:
    """Run, report, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path)
    parser.add_argument("--shared", type=Path, default=_ROOT.parent / "shared")
    parser.add_argument("--tasks", nargs="+", choices=("scratch", "further"), default=["scratch", "further"])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    rows = []
    if options.results is not None and options.results.is_file():
        earlier = json.loads(options.results.read_text(encoding="utf-8"))["results"]
        rows = [row for row in earlier if row["task"] not in options.tasks]
    rows += [row for task in options.tasks for row in run_task(task, options)]
    report(rows)
    keep(options.results, f"pretraining.py --steps {options.steps} --tasks {' '.join(options.tasks)}", rows)


if __name__ == "__main__":
    main()
