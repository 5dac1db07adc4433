"""Questions of benchmarks: the texts of the papers, what fits, and what is wrong with files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import collie_lab as lab
from collie_lab.cells import CellError, Evaluation
from collie_lab.data import prepare, save_tokenizer
from collie_lab.data.benchmarks import read_questions
from collie_lab.data.questions import Question, Room, continuation, load_questions, tokenize_questions
from collie_lab.folder import RunFolder


def _text(question: Question) -> str:
    return question.head + "".join(question.shots) + question.prompt


def test_mmlu_asks_as_its_authors_do(tmp_path: Path) -> None:
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
    (tmp_path / "dev/high_school_physics_dev.csv").write_text('"What falls, and why?",x,y,z,w,B\nUp?,1,2,3,4,A\n')
    (tmp_path / "test/high_school_physics_test.csv").write_text(
        "question,choice0,choice1,choice2,choice3,answer\nHow far?,5 m,6 m,7 m,8 m,2\n")
    (question,) = read_questions(lab.MMLU(tmp_path, shots=1))
    assert _text(question) == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "What falls, and why?\nA. x\nB. y\nC. z\nD. w\nAnswer: B\n\n"
        "How far?\nA. 5 m\nB. 6 m\nC. 7 m\nD. 8 m\nAnswer:")
    assert question.choices == (" A", " B", " C", " D")
    assert (question.reference, question.group) == (2, "high_school_physics")


def test_all_questions_of_all_benchmarks_are_read(shared: Path) -> None:
    data = shared / "data"
    counts = {lab.MMLU(data / "mmlu"): (57, "Answer:"), lab.GSM8K(data / "gsm8k"): (1, "\nAnswer:"),
              lab.BBH(data / "bbh"): (27, "\nA: Let's think step by step.\n"),
              lab.BBH(data / "bbh", style="direct"): (27, "\nA:")}
    for cell, (groups, end) in counts.items():
        questions = read_questions(cell)
        assert len({question.group for question in questions}) == groups
        assert all(question.prompt.endswith(end) for question in questions)
        assert {len(question.shots) for question in questions} == {3 if isinstance(cell, lab.BBH) else 5}
        assert not any("canary" in question.head for question in questions)
    direct = read_questions(lab.BBH(data / "bbh", tasks=("navigate",), style="direct"))[0]
    assert direct.shots[0].endswith("\nA: Yes\n\n") or direct.shots[0].endswith("\nA: No\n\n")
    problems = read_questions(lab.HumanEval(data / "humaneval/HumanEval.jsonl.gz", samples=2, limit=3))
    assert [question.fields["sample"] for question in problems] == ["0", "1"] * 3
    assert len({question.group for question in problems}) == 3
    assert read_questions(lab.GSM8K(data / "gsm8k", limit=9)) == read_questions(lab.GSM8K(data / "gsm8k", limit=9))


SMALL = lab.Experiment(model=lab.Model("llama-tiny", init="random", config={"max_position_embeddings": 256}),
                       data=lab.Skills(size=20, test_size=5))
CHOICES = [{"prompt": "a", "choices": ["b", "c"], "answer": "c"}]


@pytest.mark.parametrize(("change", "message"), [
    ({"answer": 2}, "record 0 cannot be read .the answer 2 is no number of a choice, from 0 to 1"),
    ({"answer": "d"}, "the answer 'd' is none of the choices"),
    ({"choices": ["b"]}, "two choices or more"),
    ({"choices": "cd"}, "record 0 cannot be read .the choices must be a list of texts, not 'cd'"),
    ({"choices": {"c": "d", "e": "f"}}, "the choices must be a list of texts, not {'c': 'd'"),
    ({"prompt": None}, "prompt and choices must be text"),
])
def test_wrong_records_are_named(change: dict[str, Any], message: str) -> None:
    assert read_questions(lab.MultipleChoice(CHOICES))[0].reference == 1
    with pytest.raises(CellError, match=message):
        read_questions(lab.MultipleChoice([{**CHOICES[0], **change}]))


def test_missing_fields_and_functions_are_named() -> None:
    with pytest.raises(CellError, match=r"record 1 has no field 'prompt'"):
        read_questions(lab.MultipleChoice([*CHOICES, {"question": "a"}]))
    with pytest.raises(CellError, match="raised KeyError"):
        read_questions(lab.MultipleChoice(lambda: {}["x"]))
    own = lab.MultipleChoice([{"q": "a"}], format=lambda record: (record["q"], ["x", "y"], 0))
    assert read_questions(own)[0].choices == (" x", " y")


def test_broken_files_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "bbh").mkdir()
    (tmp_path / "cot-prompts").mkdir()

    def wrong(cell: Evaluation, message: str) -> None:
        report = lab.Experiment(model=lab.Model("llama-tiny", init="random"), evaluate=[cell]).check()
        assert message in str(report.errors[0]), report

    wrong(lab.MMLU(tmp_path), "MMLU.path: " + str(tmp_path) + " holds no test/<subject>_test.csv")
    file = tmp_path / "test/law_test.csv"
    file.write_text("q,a,b,c,d,A\nq,a,b,c,A\n")
    wrong(lab.MMLU(tmp_path, shots=0), "law_test.csv, line 2: 5 values where 6 are wanted")
    file.write_text("q,a,b,c,d,A\nq,a,b,c,d,E\n")
    wrong(lab.MMLU(tmp_path, shots=0), "law_test.csv, line 2: the answer is 'E', not one of A to D or 0 to 3")
    wrong(lab.MMLU(tmp_path, subjects=("lew",)), "MMLU.subjects: there is no 'lew' → did you mean 'law'?")
    wrong(lab.MMLU(tmp_path), "law_dev.csv does not exist")
    (tmp_path / "test.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    wrong(lab.GSM8K(tmp_path, shots=0), "record 0 has no `#### <number>`")
    (tmp_path / "test.jsonl").write_text('{"question": "1+1?"\n')
    wrong(lab.GSM8K(tmp_path, shots=0), "test.jsonl, line 1, column")
    (tmp_path / "test.jsonl").write_text("\n" + "[" * 100_000)
    wrong(lab.GSM8K(tmp_path, shots=0), "test.jsonl, line 2: JSON that cannot be read: values within values")
    (tmp_path / "bbh/sort.json").write_text("[]")
    (tmp_path / "cot-prompts/sort.txt").write_text("canary\n-----\nSort.\n\nQ: b a\nA: the answer is a b.")
    wrong(lab.BBH(tmp_path), "sort.json has no list `examples`")
    (tmp_path / "bbh/sort.json").write_text("9" * 5000)
    wrong(lab.BBH(tmp_path), "sort.json: JSON that cannot be read: Exceeds the limit (4300 digits)")
    (tmp_path / "bbh/sort.json").write_bytes("[]".encode("utf-16-le"))
    wrong(lab.BBH(tmp_path), "sort.json is not UTF-8 text: it holds NUL, as UTF-16 does")
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(json.dumps({"task_id": "1"}).encode())[:-9])
    wrong(lab.HumanEval(tmp_path / "h.jsonl.gz"), "h.jsonl.gz is no valid gzip file")
    wrong(lab.HumanEval(tmp_path / "h.jsonl.gz", k=(2,)), "pass@2 of 1 completions")


def test_same_figures_of_two_evaluations_are_refused() -> None:
    for module in ("rouge_score", "sacrebleu", "sklearn"):
        pytest.importorskip(module)
    for pair in ((lab.MultipleChoice(CHOICES), lab.Classification()), (lab.ExactMatch(), lab.Generation())):
        experiment = lab.Experiment(model=lab.Model("llama-tiny", init="random"), evaluate=pair)
        assert "would write the same figures" in str(experiment.check().errors[0])
        assert experiment.replace(evaluate=(pair[0], pair[1].replace(name="b"))).check().ok


@pytest.mark.parametrize("cell", [
    lab.GSM8K("absent"), lab.BBH("absent"), lab.ExactMatch(max_new_tokens=300), lab.Generation(max_new_tokens=256),
    lab.Classification(max_new_tokens=256), lab.ExactMatch(max_new_tokens=250)])
def test_answers_that_leave_no_room_for_a_prompt_are_refused(cell: Any, tmp_path: Path) -> None:
    """By `check`, which need not read a prompt for it, and by who prepares without one."""
    virtual = lab.Prompt(tokens=6) if cell.max_new_tokens == 250 else None
    experiment = SMALL.replace(evaluate=[cell], adapter=virtual)
    told = (f"{type(cell).__name__}.max_new_tokens: {cell.max_new_tokens} tokens leave nothing of the model's context "
            f"of {250 if virtual else 256} for a prompt → lower it")
    assert str(experiment.check().errors[-1]) == told
    with pytest.raises(CellError) as caught:
        prepare(experiment, RunFolder.create(tmp_path, "run"))
    assert str(caught.value) == told
    assert told not in repr(experiment.replace(evaluate=[cell.replace(max_new_tokens=249)]).check())


def test_answers_that_have_too_little_room_are_counted(tmp_path: Path) -> None:
    evaluate = [lab.ExactMatch(max_new_tokens=156), lab.ExactMatch(max_new_tokens=157, name="b"), lab.Perplexity(),
                lab.Classification(max_new_tokens=200, limit=2), lab.Classification(by="likelihood", name="c"),
                lab.ExactMatch(data=lab.Skills(size=4, test_size=2), name="d")]
    data = lab.Instructions([{"prompt": "p" * size, "completion": "x"} for size in (40, 99, 149, 199)], holdout=0)
    asked = [cell.replace(data=data) if cell.data is None else cell for cell in evaluate]
    prepared = prepare(SMALL.replace(evaluate=asked), RunFolder.create(tmp_path, "run"))
    assert [text for text in prepared.warnings if "answers" in text] == [
        "ExactMatch: 2 of 4 answers have room for less than 156 tokens: the model's context of 256 ends them",
        "b: 3 of 4 answers have room for less than 157 tokens: the model's context of 256 ends them",
        "Classification: 1 of 2 answers have room for less than 200 tokens: the model's context of 256 ends them"]


@pytest.mark.parametrize("by", ["answer", "likelihood"])
def test_labels_that_leave_out_responses_are_refused(by: Any, tmp_path: Path) -> None:
    data = lab.Instructions([{"prompt": f"{text}?", "completion": text} for text in ("a", "b", "c", "d", "c")])
    cell = lab.Classification(data=data, labels=("a", "b"), by=by)
    with pytest.raises(CellError, match=r"Classification\.labels: 2 responses .* none of them, as 'c' → name"):
        prepare(SMALL.replace(evaluate=[cell]), RunFolder.create(tmp_path, "run"))
    for labels in ((), ("a", "b", "c" if by == "likelihood" else " c ", "d", "e")):
        prepare(SMALL.replace(evaluate=[cell.replace(labels=labels)]), RunFolder.create(tmp_path, "run"))


def test_what_does_not_fit_loses_examples_or_its_beginning_and_is_counted(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(lab.Model("llama-tiny", init="random"), tmp_path / "tokenizer")  # bytes
    asked = [Question("q" * 10, 0, (" a", " bc"), "h" * 5, ("s" * 20, "t" * 20)),
             Question("q" * 60, 1, (" a", " b"), "h", ("s" * 20,)), Question("q", 0, (" a", " b"))]
    questions, said = tokenize_questions(asked, tokenizer, Room(40))
    texts = [tokenizer.decode(questions.tokens[begin:end].tolist())
             for begin, end in zip(questions.offsets[:-1], questions.offsets[1:], strict=True)]
    assert texts == ["hhhhh" + "s" * 20 + "q" * 10 + " a", "hhhhh" + "s" * 20 + "q" * 10 + " bc",
                     "q" * 39 + " a", "q" * 39 + " b", "q a", "q b"]
    assert questions.lengths.max() == 41  # nothing is predicted from the last token
    assert said[0].startswith("2 of 3 prompts do not fit the model's context of 40 tokens with all their examples")
    assert said[1].startswith("1 of 3 prompts do not fit")
    cut, said = tokenize_questions(asked, tokenizer, Room(40, overlong="truncate"))
    assert tokenizer.decode(cut.tokens[: cut.prompt_lengths[0]].tolist()) == "s" * 9 + "t" * 20 + "q" * 10
    assert said[0].startswith("2 of 3 prompts")
    cut.save(tmp_path / "saved")
    assert load_questions(tmp_path / "saved").first.tolist() == [0, 2, 4, 6]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="a choice of 61 tokens does not fit"):
        tokenize_questions([Question("q", 0, (" " + "a" * 60, " b"))], tokenizer, Room(40))


def test_a_choice_is_tokenized_as_part_of_the_text(shared: Path, tmp_path: Path) -> None:
    """By a tokenizer of words: blanks go with the choice, and with the prompt before it nothing changes."""
    tokenizer = save_tokenizer(lab.Model(shared / "models/stories260k"), tmp_path)
    (prompt, choice), (_, same) = continuation([("Once upon", " a time"), ("Once upon ", "a time")], tokenizer)
    assert choice == same
    assert prompt + choice == tokenizer.prefix + tokenizer.encode(["Once upon a time"])[0]
