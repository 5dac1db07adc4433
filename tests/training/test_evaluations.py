"""Generation, multiple choice, classification and benchmarks, against other libraries, formulas and layouts."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import collie_lab as lab
from collie_lab.cells import Evaluation, HumanEval, Parallel
from collie_lab.data import Documents, Tokenizer, read_documents, save_tokenizer
from collie_lab.data.prepare import tokenize
from collie_lab.data.questions import Question, Room, tokenize_questions
from collie_lab.folder import RunFolder
from collie_lab.parallel import Strategy
from collie_lab.training.evaluate import evaluate
from collie_lab.training.generate import Draw, generate
from collie_lab.training.judge import Sample, judge, summarize
from collie_lab.training.likelihood import score
from collie_lab.training.model import build_model
from tests.ranks import run_here, run_ranks

CPU = torch.device("cpu")
ALONE = Strategy(Parallel(), CPU, "fp32")
CHOICES: list[dict[str, Any]] = [
    {"prompt": "Once upon a time, there was a little", "answer": 0, "choices": [
        "girl named Lily", "boy", "dog and a cat"]},
    {"prompt": "Tom saw a big", "choices": ["A", "B", "C"], "answer": "C"},
    {"prompt": "She said ", "choices": ["\"Hi\"", "no"], "answer": 1},
    {"prompt": "The sun was", "choices": ["hot", "very hot"], "answer": 0},
    {"prompt": "One day", "choices": [", Tom went to the park", "x"], "answer": 0},
]


@pytest.fixture(scope="module")
def stories(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Tokenizer]:
    """A trained model: its folder, the model and its tokenizer."""
    folder = request.getfixturevalue("shared") / "models/stories260k"
    model, *_ = build_model(lab.Experiment(model=lab.Model(folder)), CPU)
    return folder, model.eval(), save_tokenizer(lab.Model(folder), tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("flat", [True, False])
def test_likelihoods_are_those_of_a_plain_loop(flat: bool, stories: tuple[Path, Any, Tokenizer]) -> None:
    folder, _, tokenizer = stories
    questions, _ = tokenize_questions([Question(item["prompt"], 0, tuple(f" {choice}" for choice in item["choices"]))
                                       for item in CHOICES], tokenizer, Room(512))
    model, *_ = build_model(lab.Experiment(model=lab.Model(folder)), CPU)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chosen, expected, greedy = np.arange(len(questions)), [], []
    with torch.no_grad():
        if not flat:
            model.set_attn_implementation("sdpa")
        found, likeliest = score(model.eval(), questions, chosen, ALONE, batch_size=3, flat=flat, virtual=None,
                                 tick=lambda: None)
        for document, prompt in enumerate(questions.prompt_lengths):
            begin, end = questions.offsets[document : document + 2]
            ids = torch.from_numpy(questions.tokens[begin:end].astype(np.int64))[None]
            scores = torch.log_softmax(plain(ids).logits[0, prompt - 1 : -1], -1)
            expected.append(scores.gather(1, ids[0, prompt:, None]).sum().item())
            greedy.append(bool((scores.argmax(1) == ids[0, prompt:]).all()))
    assert found == pytest.approx(np.array(expected), abs=1e-4)
    assert likeliest.tolist() == greedy
    assert 0 < sum(greedy) < len(greedy)


def test_accuracies_and_their_lengths(stories: tuple[Path, Any, Tokenizer]) -> None:
    _, model, tokenizer = stories
    samples: dict[str, list[Sample]] = {}
    for normalize in ("characters", "bytes", "tokens"):
        cell = lab.MultipleChoice(CHOICES, normalize=normalize)
        found, samples[normalize] = _run(cell, model, tokenizer)
        right = [sample["accuracy_norm"] for sample in samples[normalize]]
        assert found["accuracy_norm"] == pytest.approx(np.mean(right))
        assert found["accuracy_norm_se"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    first = samples["bytes"][0]
    lengths = [len(choice) for choice in first["choices"]]
    assert first["choices"][0] == "girl named Lily"
    assert first["answer_norm"] == first["choices"][int(np.argmax(np.array(first["loglikelihoods"]) / lengths))]


def _run(cell: Evaluation, model: Any, tokenizer: Tokenizer, documents: Documents | None = None
         ) -> tuple[dict[str, float], list[Sample]]:
    from collie_lab.data.benchmarks import read_questions

    samples: list[Sample] = []
    asked = documents if documents is not None else tokenize_questions(read_questions(cell), tokenizer, Room(512))[0]
    return evaluate(cell, model, asked, tokenizer, ALONE, flat=True, keep=samples.extend), samples


def test_stop_strings_end_answers_wherever_they_lie(stories: tuple[Path, Any, Tokenizer]) -> None:
    """However they are cut into tokens, and whatever stands beside a prompt."""
    _, model, tokenizer = stories
    prompts = [np.array(tokenizer.prefix + tokenizer.encode([text])[0])
               for text in ("Once upon a time", "Tom", "One day, a")]
    with torch.no_grad():
        whole = generate(model, prompts, tokenizer, CPU, 30)
        for stop in ((".",), ("ed to", "was a l"), (" t", "zzz"), ("\n",)):
            answers = generate(model, prompts, tokenizer, CPU, 30, stop=stop)
            for answer, text in zip(answers, whole, strict=True):
                assert answer == text[: min([text.find(each) for each in stop if each in text], default=None)]
        ticks: list[int] = []
        generate(model, prompts, tokenizer, CPU, 30, stop=(" ",), tick=lambda: ticks.append(1))
    assert len(ticks) < 10


def test_drawn_answers_do_not_depend_on_their_neighbours(stories: tuple[Path, Any, Tokenizer]) -> None:
    _, model, tokenizer = stories
    prompts = [np.array(tokenizer.prefix + tokenizer.encode([text])[0]) for text in ("Once upon a time", "Tom", "Tom")]
    with torch.no_grad():
        together = generate(model, prompts, tokenizer, CPU, 12, 1.0, draw=Draw((5, 6, 7), top_p=0.9))
        for prompt, seed, answer in zip(prompts, (5, 6, 7), together, strict=True):
            assert generate(model, [prompt], tokenizer, CPU, 12, 1.0, draw=Draw((seed,), top_p=0.9)) == [answer]
        assert together[1] != together[2]
        # As often as the model finds it likely.
        ids = torch.from_numpy(prompts[1].astype(np.int64))[None]
        logits = model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).logits[0, -1]
        chances = torch.softmax(logits / 0.7, -1)
        token = int(chances.argmax())
        drawn = generate(model, [prompts[1]] * 400, tokenizer, CPU, 1, 0.7, draw=Draw(range(400)))
    share, expected = np.mean([text == tokenizer.decode([token]) for text in drawn]), float(chances[token])
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 400))


def _shorter(answer: str, reference: str) -> float:
    return float(len(answer) < len(reference))


def test_generation_is_scored_by_the_libraries(stories: tuple[Path, Any, Tokenizer]) -> None:
    pytest.importorskip("rouge_score")
    sacrebleu = pytest.importorskip("sacrebleu")
    from rouge_score.rouge_scorer import RougeScorer

    _, model, tokenizer = stories
    records = [{"prompt": "Once upon a time, there was a", "completion": " little girl named Tim. She loved to play"},
               {"prompt": "Tom and Lily were", "completion": " playing in the big park all day"},
               {"prompt": "One day, a", "completion": " little boy named Tim went for a walk"}]
    cell = lab.Generation(data=lab.Instructions(records), metrics=("exact_match", "bleu", "rouge", _shorter),
                          max_new_tokens=16, batch_size=2)
    documents, _ = tokenize(read_documents(lab.Instructions(records), "all"), tokenizer, 512, "truncate")
    found, samples = _run(cell, model, tokenizer, documents)
    answers, references = [sample["answer"] for sample in samples], [record["completion"] for record in records]
    assert [sample["index"] for sample in samples] == [0, 1, 2]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score)
    assert found["bleu"] > 5
    assert found["bleu_se"] > 0
    for name in ("rouge1", "rouge2", "rougeL"):
        theirs = [RougeScorer([name], use_stemmer=True).score(reference, answer)[name].fmeasure
                  for answer, reference in zip(answers, references, strict=True)]
        assert found[name] == pytest.approx(np.mean(theirs))
    assert found["_shorter"] == np.mean([_shorter(*pair) for pair in zip(answers, references, strict=True)])


@pytest.mark.parametrize(("found", "told"), [
    (math.nan, "nan"), (math.inf, "inf"), (None, "None"), ("1.0", "'1.0'"), ((1.0,), r"\(1\.0,\)")])
def test_scores_that_are_no_numbers_are_told(found: Any, told: str) -> None:
    def own(answer: str, reference: str) -> Any:
        return found if answer == "b" else np.float32(1)

    cells: list[tuple[Evaluation, str, str]] = [
        (lab.ExactMatch(score=own), "exact_match", "ExactMatch.score"),
        (lab.Generation(metrics=(own,)), "own", "Generation.metrics")]
    for cell, figure, field in cells:
        assert judge(cell, [Question("", "r")], ["a"], lambda: None)[0][figure] == 1.0
        with pytest.raises(lab.CellError, match=f"{field}: own gave {told} for the answer 'b' to 'r' → a score is a"):
            judge(cell, [Question("", "q"), Question("", "r")], ["a", "b"], lambda: None)


def test_f1_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = ("ab", "c d", "e", "never")
    right, said = rng.choice(labels[:3], 60), rng.choice([*labels, "no label"], 60)
    samples = [{"reference": str(a), "answer": f" {b}", "accuracy": float(a == b)}
               for a, b in zip(right, said, strict=True)]
    found = summarize(lab.Classification(labels=labels), samples)
    assert found["f1_macro"] == pytest.approx(
        metrics.f1_score(right, said, labels=labels, average="macro", zero_division=0))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(right, said))
    halves = [metrics.f1_score(right[draw], said[draw], labels=labels, average="macro", zero_division=0)
              for draw in np.random.default_rng(1).integers(0, 60, size=(100, 60))]
    assert found["f1_macro_se"] == pytest.approx(np.std(halves), rel=0.25)


def test_pass_at_k_is_the_chance_that_one_of_k_is_right() -> None:
    """Equation 1 of the paper, beside all ways to choose k of n."""
    rights = {"a": [1.0, 0, 0, 0, 0], "b": [1.0, 1, 1, 0, 0], "c": [0.0] * 5}
    samples = [{"group": group, "passed": passed} for group, values in rights.items() for passed in values]
    found = summarize(HumanEval("f", execute=True, samples=5, k=(1, 2, 5)), samples)
    for k in (1, 2, 5):
        each = [np.mean([max(some) for some in itertools.combinations(values, k)]) for values in rights.values()]
        assert found[f"humaneval_pass_at_{k}"] == pytest.approx(np.mean(each))
        assert found[f"humaneval_pass_at_{k}_se"] == pytest.approx(np.std(each, ddof=1) / math.sqrt(3))


def test_perplexitys_standard_error_is_the_jackknifes() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 40, 300)
    nll = tokens * rng.normal(2.0, 0.3, 300)
    found = summarize(lab.Perplexity(), [{"nll": a, "tokens": int(b)} for a, b in zip(nll, tokens, strict=True)])
    without = np.array([(nll.sum() - a) / (tokens.sum() - b) for a, b in zip(nll, tokens, strict=True)])
    jackknife = math.sqrt(299 / 300 * np.square(without - without.mean()).sum())
    assert found["nll"] == pytest.approx(nll.sum() / tokens.sum())
    assert found["nll_se"] == pytest.approx(jackknife, rel=0.01)
    assert found["perplexity_se"] == pytest.approx(jackknife * found["perplexity"], rel=0.01)


# --- layouts ----------------------------------------------------------------------------------------


def _programs(folder: Path) -> Path:
    file = folder / "HumanEval.jsonl"
    file.write_text("".join(json.dumps({
        "task_id": f"T/{place}", "prompt": f"def f{place}():\n", "entry_point": f"f{place}",
        "test": "def check(f): pass"}) + "\n" for place in range(2)))
    return file


def _experiment(folder: Path) -> lab.Experiment:
    intents = [{"prompt": f"{word} ", "completion": word.upper()} for word in ("yes", "no", "maybe", "no", "yes")]
    evaluate = [
        lab.Perplexity(), lab.ExactMatch(max_new_tokens=4, stop=("a",), batch_size=2),
        lab.MultipleChoice(CHOICES, batch_size=2),
        lab.Classification(data=lab.Instructions(intents, holdout=0), by="likelihood", name="intent"),
        HumanEval(_programs(folder), samples=2, temperature=1.0, max_new_tokens=4, execute=True),
    ]
    return lab.Experiment(model=lab.Model("llama-tiny", init="random"), data=lab.Skills(size=16, test_size=5),
                          training=lab.Training(steps=1, batch_size=4, export=False), evaluate=evaluate)


LAYOUTS = {"zero3": Parallel(dp=2, zero=3), "tensor": Parallel(tp=2, sequence_parallel=True),
           "pipeline": Parallel(pp=2)}


def _run_layouts(folder: str) -> None:
    for name, layout in LAYOUTS.items():
        run_here(_experiment(Path(folder)).replace(parallel=layout), Path(folder) / name)


@pytest.mark.ranks
def test_every_layout_gives_the_samples_of_one_process(tmp_path: Path) -> None:
    """Each once, in the order of the data: five questions on two ranks, one of which has fewer."""
    pytest.importorskip("sklearn")
    alone = run_here(_experiment(tmp_path), tmp_path / "alone")
    run_ranks(_run_layouts, 2, str(tmp_path))
    expected = _answers(alone)
    assert {name: len(samples) for name, samples in expected.items()} == {
        "perplexity": 5, "exact_match": 5, "multiple_choice": 5, "intent_classification": 5, "humaneval": 4}
    for name in LAYOUTS:
        run = RunFolder(tmp_path / name)
        for evaluation, samples in _answers(run).items():
            for sample, other in zip(samples, expected[evaluation], strict=True):
                assert sample.keys() == other.keys()
                for key, value in sample.items():
                    same = pytest.approx(other[key], abs=1e-4) if key in ("loglikelihoods", "nll") else other[key]
                    assert value == same, (name, evaluation, key)
        figures, theirs = run.read("result.json"), alone.read("result.json")
        for key in ("perplexity", "nll_se", "exact_match", "accuracy", "accuracy_norm", "intent_f1_macro",
                    "humaneval_pass_at_1"):
            assert figures[key] == pytest.approx(theirs[key], rel=1e-4), (name, key)
    handle = lab.Run(alone)
    assert handle.answers("multiple_choice").index.tolist() == [0, 1, 2, 3, 4]
    assert handle.answers("humaneval", step=1)["group"].tolist() == ["T/0", "T/0", "T/1", "T/1"]
    with pytest.raises(ValueError, match="has answers of: exact_match, humaneval, "):
        handle.answers()
    with pytest.raises(ValueError, match="was run after steps 1, not 2"):
        handle.answers("perplexity", step=2)


def _answers(run: RunFolder) -> dict[str, list[dict[str, Any]]]:
    return {path.stem.removesuffix("-step-000001"): [json.loads(line) for line in path.read_text().splitlines()]
            for path in run.evaluations.glob("*-step-000001.jsonl")}
