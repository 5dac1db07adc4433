"""The evaluators beside lm-evaluation-harness, to the last sample, and its tasks on the model in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import collie_lab as lab
from collie_lab.cells import BBH, GSM8K, MMLU, CellError, Evaluation, MultipleChoice
from collie_lab.data.lm_eval_tasks import check_tasks, load_tasks
from tests.ranks import run_here

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `eval`)")

from collie_lab.testing.lm_eval import compare


@pytest.fixture
def few(shared: Path, tmp_path: Path) -> Path:
    """The first questions of the benchmarks, in folders like theirs."""
    data = shared / "data"
    for file in ("test/anatomy_test.csv", "dev/anatomy_dev.csv"):
        target = tmp_path / "mmlu" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join((data / "mmlu" / file).read_text().splitlines(keepends=True)[:9]))
    (tmp_path / "gsm8k").mkdir()
    for file in ("test.jsonl", "train.jsonl"):
        lines = (data / "gsm8k" / file).read_text().splitlines(keepends=True)
        (tmp_path / "gsm8k" / file).write_text("".join(lines[:6]))
    (tmp_path / "bbh/bbh").mkdir(parents=True)
    (tmp_path / "bbh/cot-prompts").mkdir()
    content = json.loads((data / "bbh/bbh/navigate.json").read_text())
    (tmp_path / "bbh/bbh/navigate.json").write_text(json.dumps({"examples": content["examples"][:4]}))
    shutil.copy(data / "bbh/cot-prompts/navigate.txt", tmp_path / "bbh/cot-prompts")
    return tmp_path


def test_evaluators_agree_to_the_last_sample(few: Path, shared: Path) -> None:
    """The cells and lm-eval's own task definitions: likelihoods, answers and scores; also of prompts that were cut."""
    texts = [{"prompt": "Once upon a time, there was a little", "choices": ["girl named Lily", "boy", "dog. The dog"],
              "answer": 1}, {"prompt": "Tom had a ", "choices": ["red ball", "big, big dog"], "answer": 0}]
    cells: list[Evaluation] = [
        MMLU(few / "mmlu", subjects=("anatomy",), shots=1), MultipleChoice(texts),
        GSM8K(few / "gsm8k", shots=1, max_new_tokens=12), BBH(few / "bbh", tasks=("navigate",), max_new_tokens=8),
    ]
    for number, cell in enumerate(cells):
        folder = few / str(number)
        folder.mkdir()
        found = compare(shared / "models/stories260k", cell, folder, batch_size=4)
        assert found.samples >= 2
        assert not any(found.different.values()), found
        assert found.largest is None or found.largest < 1e-4, found


def test_judges_agree_with_lm_evals_filters_and_metrics() -> None:
    """Small models never answer right: the scores of answers that do."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    from collie_lab.data.questions import Question
    from collie_lab.training.judge import judge

    solution = "He has 3*400 = <<3*400=1200>>1200 dollars.\n#### 1,200"
    answers = [" 1200\n#### 1,200", "#### 1200.", "so $1,200.", "#### 12 or 1200", "####1200", "none",
               "#### 1200 dollars", "#### $1200", "it is 7, no: -1200"]
    ignore = [",", "\\$", "(?s).*#### ", "\\.$"]
    samples = judge(GSM8K("gsm8k"), [Question("", solution)] * len(answers), answers, lambda: None)
    for name, chosen in (("gsm8k", RegexFilter("#### (\\-?[0-9\\.\\,]+)")),
                         ("gsm8k_flexible", RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1))):
        theirs = [exact_match_hf_evaluate([found], [solution], ignore, ignore_case=True)["exact_match"]
                  for (found,) in chosen.apply([[answer] for answer in answers], [{}] * len(answers))]
        assert [sample[name] for sample in samples] == theirs, name
        assert 0 < sum(theirs) < len(answers)
    answers = ["So the answer is (B).", "the answer is (B)", "So the answer is (B).\nNo, the answer is (A).", "(B)"]
    samples = judge(BBH("bbh"), [Question("", "(B)")] * len(answers), answers, lambda: None)
    found = RegexFilter("(?<=the answer is )(.*)(?=.)").apply([[answer] for answer in answers], [{}] * len(answers))
    assert [sample["bbh"] for sample in samples] == [float(answer == "(B)") for (answer,) in found] == [1, 0, 1, 0]


TASK = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three local tasks: choices, answers and the likelihood of whole texts."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = [{"q": f"There was a {word} ", "choices": ["cat and a dog", "dog"], "gold": 1,
                "text": f"A {word} story. " * 9} for word in ("big", "small", "red", "happy", "little")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    own = {
        "choices": {"output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "choices",
                    "doc_to_target": "gold"},
        "written": {"output_type": "generate_until", "doc_to_text": "q", "doc_to_target": "{{choices[gold]}}",
                    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
                    "generation_kwargs": {"until": ["."], "do_sample": False, "max_gen_toks": 8}},
        "whole": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text", "metric_list": [
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}]},
    }
    (tmp_path / "tasks").mkdir()
    for name, fields in own.items():
        text = yaml.safe_dump({**TASK, "task": f"own_{name}", **fields, "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "data.jsonl")}}})
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text)
    return tmp_path / "tasks"


def test_tasks_of_lm_eval_run_on_the_model_in_training(tasks: Path, shared: Path, tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ("own_choices", "own_written", "own_whole")
    experiment = lab.Experiment(
        model=lab.Model(shared / "models/stories260k"), data=lab.Skills(size=8, test_size=2),
        training=lab.Training(steps=1, batch_size=2), optimizer=lab.AdamW(lr=1e-3),
        evaluate=[lab.LMEval(names, include_path=str(tasks), name="lm", batch_size=2)])
    run = run_here(experiment, tmp_path / "run")
    exported = HFLM(str(run.path / "model"), dtype="float32", device="cpu", batch_size=2)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = evaluate(exported, load_tasks(names, manager), bootstrap_iters=2)["results"]
    ours = run.read("result.json")
    assert ours["lm_own_choices_acc"] == theirs["own_choices"]["acc,none"]
    assert ours["lm_own_choices_acc_se"] == pytest.approx(theirs["own_choices"]["acc_stderr,none"])
    assert ours["lm_own_written_exact_match"] == theirs["own_written"]["exact_match,none"]
    assert ours["lm_own_whole_byte_perplexity"] == pytest.approx(theirs["own_whole"]["byte_perplexity,none"], rel=1e-5)
    answers = lab.Run(run).answers("lm_lm_eval")
    assert len(answers) == 15
    assert list(answers["task"].unique()) == sorted(names)


def test_broken_tasks_are_found_before_the_start(tasks: Path) -> None:
    (tasks.parent / "data.jsonl").unlink()
    with pytest.raises(CellError, match=r"LMEval.tasks: own_choices does not load"):
        check_tasks(lab.LMEval("own_choices", include_path=str(tasks)))
