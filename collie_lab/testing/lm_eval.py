"""The same questions to the same model by lm-evaluation-harness and by this project's cells, sample by sample.

lm-eval's tasks read the hub. Here the definitions that it ships (prompts, examples, stop strings, filters, metrics)
read local files, and take the first examples where they would draw them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from collie_lab.cells import BBH, GSM8K, MMLU, Benchmark, Evaluation, Experiment, Model, Parallel
from collie_lab.data import context_length, model_config, save_tokenizer
from collie_lab.data._files import Place, read_csv, read_json, read_json_lines
from collie_lab.data.benchmarks import read_questions
from collie_lab.data.lm_eval_tasks import load_tasks
from collie_lab.data.questions import Room, tokenize_questions
from collie_lab.parallel import Strategy
from collie_lab.training.evaluate import evaluate
from collie_lab.training.judge import Sample
from collie_lab.training.model import build_model

__all__ = ["Difference", "compare"]

#: Our scores, and the metric and filter of lm-eval's.
_SCORES: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "mmlu": {"mmlu": ("acc", "none")},
    "multiple_choice": {"accuracy": ("acc", "none"), "accuracy_norm": ("acc_norm", "none")},
    "gsm8k": {"gsm8k": ("exact_match", "strict-match"), "gsm8k_flexible": ("exact_match", "flexible-extract")},
    "bbh_cot": {"bbh": ("exact_match", "get-answer")},
    "bbh_direct": {"bbh": ("exact_match", "none")},
}


@dataclass
class Difference:
    """How far two evaluators are apart on the samples of one task."""

    task: str
    samples: int
    cut: int
    """Prompts that did not fit and were cut on the left, by both."""
    different: dict[str, int] = field(default_factory=dict)
    """Of each score, and of the answers themselves: the samples in which the two differ."""
    largest: float | None = None
    """The largest difference of a choice's log-likelihood, in nats."""
    ours: dict[str, float] = field(default_factory=dict)
    theirs: dict[str, float] = field(default_factory=dict)


def compare(model: Path, cell: Evaluation, folder: Path, *, batch_size: int = 16) -> Difference:
    """Evaluate a model's folder with a cell, of one subject or task, and with lm-eval's own; `folder` is for files.

    Prompts that do not fit are cut on the left, as lm-eval does.
    """
    if isinstance(cell, Benchmark):
        cell = cell.replace(overlong="truncate")
    config = _task(cell, folder)
    ours, cut = _ours(model, cell, folder)
    theirs = _theirs(model, config, folder, batch_size)
    found = Difference(config["task"], len(ours), cut)
    scores = _SCORES[f"bbh_{cell.style}" if isinstance(cell, BBH) else cell.kind]
    for score, (metric, chosen) in scores.items():
        values = [float(sample[metric]) for sample in theirs if sample["filter"] == chosen]
        mine = [float(sample[score]) for sample in ours]
        found.different[score] = sum(a != b for a, b in zip(mine, values, strict=True))
        found.ours[score], found.theirs[score] = (sum(each) / len(each) for each in (mine, values))
    first = [sample for sample in theirs if sample["filter"] == theirs[0]["filter"]]
    if "loglikelihoods" in ours[0]:
        found.largest = max(abs(a - b[0]) for mine, each in zip(ours, first, strict=True)
                            for a, b in zip(mine["loglikelihoods"], (resps[0] for resps in each["resps"]), strict=True))
    else:
        found.different["answers"] = sum(mine["answer"] != each["resps"][0][0]
                                         for mine, each in zip(ours, first, strict=True))
    return found


def _ours(model: Path, cell: Evaluation, folder: Path) -> tuple[list[Sample], int]:
    """The samples, and how many prompts were cut."""
    source = Model(model)
    tokenizer = save_tokenizer(source, folder / "tokenizer")
    context, answer = context_length(model_config(source)), getattr(cell, "max_new_tokens", 0)
    questions, said = tokenize_questions(read_questions(cell), tokenizer, Room(context, answer, "truncate"))
    causal_lm, *_ = build_model(Experiment(model=source), torch.device("cpu"))
    samples: list[Sample] = []
    evaluate(cell, causal_lm, questions, tokenizer, Strategy(Parallel(), torch.device("cpu"), "fp32"), flat=True,
             keep=samples.extend)
    return samples, int(said[0].split()[0]) if said else 0


def _theirs(model: Path, config: dict[str, Any], folder: Path, batch_size: int) -> list[dict[str, Any]]:
    """lm-eval's samples, by its own class for models of transformers."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    from lm_eval.evaluator import evaluate as evaluate_tasks
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    causal_lm = HFLM(str(model), dtype="float32", device="cpu", batch_size=batch_size)
    tasks = load_tasks([config], TaskManager(include_defaults=False))
    results = evaluate_tasks(causal_lm, tasks, bootstrap_iters=0, log_samples=True)
    samples: list[dict[str, Any]] = results["samples"][config["task"]]
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


# --- lm-eval's tasks on local files ---------------------------------------------------------------


def _task(cell: Evaluation, folder: Path) -> dict[str, Any]:
    """lm-eval's own definition of the task, which reads the hub, on the files of the cell."""
    match cell:
        case MMLU():
            (subject,) = cell.subjects
            data = {split: [{"question": row[0], "choices": row[1:5], "answer": int(row[5])} for _, row in read_csv(
                Place(cell, "path"), Path(cell.path) / split / f"{subject}_{split}.csv", 6)[1:]]
                for split in ("test", "dev")}
            return _on_files(f"mmlu/default/mmlu_{subject}.yaml", data, folder, shots=cell.shots)
        case GSM8K():
            data = {split: read_json_lines(Place(cell, "path"), Path(cell.path) / f"{split}.jsonl")
                    for split in ("test", "train")}
            config = _on_files("gsm8k/gsm8k.yaml", data, folder, shots=cell.shots)
            config["fewshot_config"] = {"sampler": "first_n"}  # it would draw them
        case BBH():
            (task,) = cell.tasks
            data = {"test": read_json(Place(cell, "path"), Path(cell.path) / "bbh" / f"{task}.json")["examples"]}
            style = {"cot": "cot_fewshot", "direct": "fewshot"}[cell.style]
            config = _on_files(f"bbh/{style}/{task}.yaml", data, folder, shots=3)
        case _:
            data = {"test": [{"prompt": item.prompt, "answer": item.reference, "choices": [
                choice.removeprefix(" ") for choice in item.choices]} for item in read_questions(cell)]}
            return _on_files(None, data, folder, shots=0)
    config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": cell.max_new_tokens}
    return config


def _on_files(definition: str | None, data: dict[str, list[dict[str, Any]]], folder: Path, *, shots: int
              ) -> dict[str, Any]:
    """A definition that lm-eval ships with these data in its place; or one of multiple choice."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = dict(_CHOICES) if definition is None else load_yaml(Path(lm_eval.tasks.__file__).parent / definition)
    files = {split: str(folder / f"{split}.jsonl") for split in data}
    for split, records in data.items():
        Path(files[split]).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    config.pop("tag", None)
    return {**config, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files},
            "num_fewshot": shots}


_CHOICES: Final = {
    "task": "multiple_choice", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{prompt}}",
    "doc_to_choice": "choices", "doc_to_target": "answer",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
