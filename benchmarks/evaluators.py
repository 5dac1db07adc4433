"""The evaluators beside lm-evaluation-harness: the same model, the same questions, compared sample by sample.

    python benchmarks/evaluators.py MODELS DATA [--json FILE]

MODELS is a folder of transformers folders, DATA one with the benchmarks' own files: `mmlu`, `gsm8k`, `bbh`. Needs the
extra `eval`. lm-eval runs the definitions that it ships, on these files, with its class for models of transformers
(`collie_lab.testing.lm_eval`); prompts longer than a model's context are cut on the left by both. All samples of each
file are asked. Per task: the samples, how many prompts were cut, in how many samples answers and scores differ, and by
how much log-likelihoods do.
"""

from __future__ import annotations

import argparse
import csv
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from _results import keep

from collie_lab.cells import BBH, GSM8K, MMLU, Evaluation, MultipleChoice
from collie_lab.testing.lm_eval import compare


def cells(data: Path) -> Iterator[tuple[str, Evaluation]]:
    """What is compared, with a name for each."""
    for subject in ("abstract_algebra", "anatomy", "virology"):
        for shots in (0, 1):
            yield f"{subject}, {shots}-shot", MMLU(data / "mmlu", subjects=(subject,), shots=shots)
        yield f"{subject}, the choices' own texts", MultipleChoice(_texts(data, subject))
    yield "1-shot", GSM8K(data / "gsm8k", shots=1, max_new_tokens=16)
    for task in ("boolean_expressions", "snarks"):
        yield f"{task}, 3-shot, answers alone", BBH(data / "bbh", tasks=(task,), style="direct", max_new_tokens=8)
        yield f"{task}, 3-shot, chain of thought", BBH(data / "bbh", tasks=(task,), max_new_tokens=24)


def _texts(data: Path, subject: str) -> list[dict[str, Any]]:
    """MMLU's questions with their answers as choices: these have unlike lengths."""
    with (data / "mmlu" / "test" / f"{subject}_test.csv").open(encoding="utf-8", newline="") as file:
        return [{"prompt": f"Question: {row['question']}\nAnswer:", "answer": int(row["answer"]),
                 "choices": [row[f"choice{place}"] for place in range(4)]} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    results = []
    for model in sorted(path for path in options.models.iterdir() if (path / "config.json").is_file()):
        for name, cell in cells(options.data):
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found = compare(model, cell, Path(folder))
            apart = ", ".join(f"{score} {count}" for score, count in found.different.items())
            largest = "" if found.largest is None else f"; log-likelihoods within {found.largest:.1e}"
            print(f"{model.name}, {type(cell).__name__}, {name}: {found.samples} samples, {found.cut} cut; "
                  f"different: {apart}{largest} ({time.perf_counter() - began:.0f} s)", flush=True)
            results.append({"model": model.name, "cell": type(cell).__name__, "name": name, **asdict(found)})
            keep(options.json, "evaluators.py MODELS DATA --json FILE", results)


if __name__ == "__main__":
    main()
