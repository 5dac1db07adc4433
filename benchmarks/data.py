"""How full packed sequences are, how fast tokenization is, whether the loader keeps up, what groups of like length buy.

    python benchmarks/data.py --data FOLDER --tokenizers FOLDER... [--repeats 5] [--json FILE]

`--data` holds Alpaca files (`*.json`); `--tokenizers` are folders with a `tokenizer.json`.

- **packing**: tokens of the documents over the tokens that their sequences could hold, in one epoch.
- **tokenization**: documents per second of the wall clock, from records in memory to ids and loss mask, beside
  `datasets.map(batched=True)` in one process with the same transformers fast tokenizer; once with the threads that the
  tokenizers library starts by itself, once without them (`TOKENIZERS_PARALLELISM=false`) on the other side. The ids of
  both must be equal. Arms take turns; a repeat's ratio is between neighbours in time.
- **loader**: CPU milliseconds to order and collate a step's batch, beside those of the step itself.
- **memory**: the most anonymous memory that a new process adds as it tokenizes a corpus, and one four times as large.
- **groups of like length**: padding of padded rows, and how long ranks wait for the slowest of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99", "COLLIE_LAB_DATA_CACHE": "off"}

import datasets
import numpy as np
import torch
from _results import keep, machine
from transformers import AutoTokenizer

from collie_lab.cells import AdamW, Experiment, Instructions, Model, Training
from collie_lab.data import Documents, Order, Tokenizer, pack, prepare, read_documents
from collie_lab.data.prepare import tokenize
from collie_lab.folder import RunFolder
from collie_lab.training.batch import collate
from collie_lab.training.trainer import Trainer

_LENGTHS = (512, 1024, 2048)

Result = dict[str, Any]


def packing(files: list[Path], folders: list[Path]) -> list[Result]:
    """The share of each epoch's sequences that is tokens, for every file, tokenizer and length."""
    rows = []
    for file in files:
        records = read_documents(Instructions(str(file), holdout=0), "train")
        for folder in folders:
            for length in _LENGTHS:
                documents, cut = tokenize(records, Tokenizer(folder), length, "truncate")
                order = np.random.default_rng(0).permutation(len(documents))
                began = time.process_time()
                sequences = pack(documents.lengths, order, length)
                seconds = time.process_time() - began
                rows.append({
                    "file": file.stem, "tokenizer": folder.name, "length": length, "documents": len(documents),
                    "truncated": cut, "sequences": len(sequences),
                    "efficiency": float(documents.lengths.sum()) / (len(sequences) * length),
                    "least_possible_sequences": int(np.ceil(documents.lengths.sum() / length)),
                    "microseconds_per_document": 1e6 * seconds / len(documents),
                })
                print("  {file} {tokenizer} {length}: {efficiency:.2%} ({sequences} sequences, at least "
                      "{least_possible_sequences})".format(**rows[-1]))
    return rows


def tokenization(file: Path, folder: Path, repeats: int) -> Result:
    """Documents per second of both sides, and the ratios of neighbouring repeats."""
    items = read_documents(Instructions(str(file), holdout=0), "train")
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    rows = datasets.Dataset.from_list([dict(zip(("prompt", "answer"), (text for text, _ in item.segments), strict=True))
                                       for item in items])
    end = [] if ours.eos_id is None else [ours.eos_id]

    def encode(batch: Any) -> dict[str, list[list[int]]]:
        prompts, answers = (theirs(batch[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "answer"))
        prompts, answers = [ours.prefix + ids for ids in prompts], [ids + end for ids in answers]
        return {"input_ids": [a + b for a, b in zip(prompts, answers, strict=True)],
                "labels": [[-100] * len(a) + b for a, b in zip(prompts, answers, strict=True)]}

    def by_map(threads: bool) -> Callable[[], Any]:
        def run() -> Any:
            os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads else "false"
            return rows.map(encode, batched=True, remove_columns=["prompt", "answer"], load_from_cache_file=False)
        return run

    def by_us() -> Documents:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        return tokenize(items, ours, 10**9, "truncate")[0]

    expected = [token for row in by_map(True)()["input_ids"] for token in row]
    assert by_us().tokens.tolist() == expected
    arms = {"collie_lab": by_us, "map": by_map(True), "map, one thread": by_map(False)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm()
            times[name].append(time.perf_counter() - began)
    result: Result = {"file": file.stem, "tokenizer": folder.name, "documents": len(items), "tokens": len(expected)}
    for name, seconds in times.items():
        result[name] = {"documents_per_second": len(items) / statistics.median(seconds)}
        if name != "collie_lab":
            ratios = sorted(b / a for a, b in zip(times["collie_lab"], seconds, strict=True))
            result[name] |= {"ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1]}
            print(f"  {file.stem} {folder.name}: {result['collie_lab']['documents_per_second']:,.0f} documents/s, "
                  f"{statistics.median(ratios):.2f}x of {name} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return result


def loader(shape: str, file: Path, packed: bool, steps: int) -> Result:
    """CPU milliseconds of the loader's part of a step, and of the whole step."""
    ends: list[float] = []
    experiment = Experiment(
        model=Model(shape, init="random"), data=Instructions(str(file), max_length=512, packing=packed),
        optimizer=AdamW(lr=1e-3), callbacks=(lambda trainer: ends.append(time.process_time()),),
        training=Training(steps=steps, batch_size=8, export=False))
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(folder, "loader")
        prepare(experiment, run)
        Trainer(experiment, run, torch.device("cpu")).run()
        step = statistics.median(np.diff(ends[2:]))
        loading = _loading(Documents.load(run.path / "data/train"), 8, 512 if packed else None)
    print(f"  {shape}, {'packed' if packed else 'one document a row'}: {1e3 * loading:.2f} ms of {1e3 * step:.0f} ms")
    return {"model": shape, "packed": packed, "loader_ms": 1e3 * loading, "step_ms": 1e3 * step}


def _loading(documents: Documents, batch_size: int, length: int | None) -> float:
    """CPU-seconds to order and collate one step: the median of 50."""
    order = Order(documents, batch_size=batch_size, micro_batch_size=batch_size, packing=length).steps()
    seconds = []
    for _ in range(52):
        began = time.process_time()
        collate(documents, next(order).micro_batches[0], torch.device("cpu"), flat=True)
        seconds.append(time.process_time() - began)
    return statistics.median(seconds[2:])  # the first packs the epoch


def large_batch(file: Path, folder: Path) -> Result:
    """CPU milliseconds to order and collate 8 sequences of 2,048 tokens: what a GPU would wait for."""
    documents, _ = tokenize(read_documents(Instructions(str(file), holdout=0), "train"), Tokenizer(folder), 2048,
                            "truncate")
    seconds = _loading(documents, 8, 2048)
    print(f"  8 x 2,048 tokens: {1e3 * seconds:.2f} ms")
    return {"tokens": 8 * 2048, "loader_ms": 1e3 * seconds}


_MEMORY = """
import sys, threading, time
from pathlib import Path
import collie_lab as lab
from collie_lab.data import prepare
from collie_lab.folder import RunFolder

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def watch():
    while True:
        peaks[0] = max(peaks[0], anonymous())
        time.sleep(0.01)

def run(source):
    run = RunFolder.create(sys.argv[1], "memory")
    prepare(lab.Experiment(model=lab.Model("llama-tiny", init="random"), data=lab.Text(source, max_length=2048)), run)

run(["warm up " * 9] * 50)
before, peaks = anonymous(), [0]
threading.Thread(target=watch, daemon=True).start()
run(sys.argv[2])
print(peaks[0] - before)
"""


def memory(megabytes: tuple[int, ...] = (32, 128)) -> list[Result]:
    """Bytes of anonymous memory that tokenizing a JSONL corpus adds at most, by the size of the corpus."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in megabytes:
            file, rng = Path(folder) / f"{size}.jsonl", np.random.default_rng(0)
            words = np.array([f"word{number}" for number in range(1000)])
            with file.open("w", encoding="utf-8") as out:
                while out.tell() < size * 1e6:
                    out.write(json.dumps({"text": " ".join(rng.choice(words, 300))}) + "\n")
            began = time.perf_counter()
            shown = subprocess.run([sys.executable, "-c", _MEMORY, folder, str(file)], check=True, text=True,
                                   capture_output=True).stdout
            rows.append({"corpus_bytes": file.stat().st_size, "added_bytes": int(shown.split()[-1]),
                         "seconds": time.perf_counter() - began})
            print(f"  corpus of {size} MB: {rows[-1]['added_bytes'] / 1e6:.0f} MB more, {rows[-1]['seconds']:.0f} s")
    return rows


def groups(file: Path, folder: Path) -> list[Result]:
    """Over one epoch of unpacked documents, with and without `group_by_length`: see the columns."""
    documents, _ = tokenize(read_documents(Instructions(str(file), holdout=0), "train"), Tokenizer(folder), 512,
                            "truncate")
    rows = []
    for dp, group in ((1, False), (1, True), (2, False), (2, True), (8, False), (8, True)):
        ranks = [Order(documents, batch_size=32, micro_batch_size=4, dp_rank=rank, dp_size=dp, group_by_length=group)
                 for rank in range(dp)]
        steps = list(zip(*(islice(rank.steps(), len(documents) // 32) for rank in ranks), strict=True))
        tokens = np.array([[[documents.lengths[batch].sum() for batch in part.micro_batches] for part in step]
                           for step in steps])  # steps, ranks, micro-batches
        padded = sum(int(documents.lengths[batch].max()) * len(batch)
                     for step in steps for part in step for batch in part.micro_batches)
        rows.append({
            "dp": dp, "group_by_length": group, "padded_tokens_per_token": padded / int(tokens.sum()),
            "slowest_rank_over_mean": float(tokens.max(axis=1).sum() / tokens.mean(axis=1).sum()),
            "spread_of_tokens_per_step": float(tokens.sum(axis=(1, 2)).std() / tokens.sum(axis=(1, 2)).mean()),
            "largest_micro_batch": int(tokens.max()),
        })
        print("  dp {dp}, grouped {group_by_length}: padding {padded_tokens_per_token:.3f}, slowest rank "
              "{slowest_rank_over_mean:.3f}, spread {spread_of_tokens_per_step:.2f}, largest micro-batch "
              "{largest_micro_batch}".format(**rows[-1]))
    return rows


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizers", type=Path, nargs="+", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    datasets.disable_progress_bars()
    files, folders = sorted(chosen.data.glob("*.json")), chosen.tokenizers
    parts: dict[str, Callable[[], Any]] = {
        "packing": lambda: packing(files, folders),
        "groups": lambda: groups(files[-1], folders[0]),
        "loader": lambda: [loader(shape, files[-1], packed, steps=6)
                           for shape in ("llama-1m", "llama-5m") for packed in (True, False)],
        "large_batch": lambda: large_batch(files[-1], folders[0]),
        "memory": memory,
        "tokenization": lambda: [tokenization(file, folder, chosen.repeats) for file in files for folder in folders],
    }
    print(machine()["cpu"])
    results: Result = {}
    names = " ".join(folder.name for folder in folders)
    for part, measure in parts.items():
        print(part)
        results[part] = measure()
        keep(chosen.json, f"data.py --data {chosen.data.name} --tokenizers {names} --repeats {chosen.repeats}", results)


if __name__ == "__main__":
    main()
