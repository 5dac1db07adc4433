"""From the files of public benchmarks, and of one's own, to questions in the form of the papers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from collie_lab.cells import BBH, GSM8K, MMLU, Benchmark, Evaluation, HumanEval, MultipleChoice
from collie_lab.data._files import Place, read_csv, read_json, read_json_lines, read_text
from collie_lab.data.questions import Question, drawn

__all__ = ["read_questions"]

_LETTERS: Final = ("A", "B", "C", "D")


def read_questions(cell: Evaluation) -> list[Question]:
    """The questions of an evaluation that has its own, in the order of their files; of `cell.limit`, a sample.

    Raises:
        CellError: a missing or broken file, a record without its field; with file, line and field.
    """
    match cell:
        case MultipleChoice():
            questions = _multiple_choice(cell)
        case MMLU():
            questions = _mmlu(cell)
        case GSM8K():
            questions = _gsm8k(cell)
        case BBH():
            questions = _bbh(cell)
        case HumanEval():
            questions = _humaneval(cell)
        case _:
            raise TypeError(f"no questions for the cell {type(cell).__name__}")
    questions = [questions[place] for place in drawn(len(questions), cell.limit)]
    if isinstance(cell, HumanEval):  # every sample is a question: completions are drawn apart
        return [replace(item, fields={**item.fields, "sample": str(number)})
                for item in questions for number in range(cell.samples)]
    return questions


# --- multiple choice ------------------------------------------------------------------------------


def _multiple_choice(cell: MultipleChoice) -> list[Question]:
    place = Place(cell, "source")
    records, name = _records(cell, place)
    if not records:
        raise place.error(f"{name} holds no questions", "give it at least one")
    questions = []
    for index, record in enumerate(records):
        try:
            parts = cell.format(record) if cell.format else (record["prompt"], record["choices"], record["answer"])
            questions.append(_choice_question(*parts))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            missing = f"has no field {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise place.error(f"{name}: record {index} {missing}: {record!r:.120}", "mend the record, or give `format` "
                              "a function from a record to (prompt, choices, answer)") from None
    return questions


def _records(cell: MultipleChoice, place: Place) -> tuple[Sequence[Any], str]:
    source = cell.source
    if callable(source):
        try:
            return list(source()), "the source"
        except Exception as error:
            raise place.error(f"the function that gives the records raised {error!r}") from error
    if not isinstance(source, str):
        return source, "the source"
    if source.removesuffix(".gz").endswith(".jsonl"):
        return read_json_lines(place, source), source
    found = read_json(place, source)
    if not isinstance(found, list):
        raise place.error(f"{source} holds no list of records, but {type(found).__name__}", "a JSON file is a list")
    return found, source


def _choice_question(prompt: str, choices: Iterable[str], answer: int | str) -> Question:
    if isinstance(choices, (str, Mapping)):  # which would be its letters, or its keys
        raise TypeError(f"the choices must be a list of texts, not {choices!r:.40}")
    choices = tuple(choices)
    if not isinstance(prompt, str) or not all(isinstance(choice, str) and choice for choice in choices):
        raise TypeError("prompt and choices must be text")
    if len(choices) < 2:
        raise ValueError("a question has two choices or more")
    if isinstance(answer, str):
        if answer not in choices:
            raise ValueError(f"the answer {answer!r} is none of the choices")
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"the answer {answer!r} is no number of a choice, from 0 to {len(choices) - 1}")
    return Question(prompt, answer, tuple(f" {choice}" for choice in choices))


# --- MMLU -----------------------------------------------------------------------------------------


def _mmlu(cell: MMLU) -> list[Question]:
    found = sorted(path.name.removesuffix("_test.csv") for path in (_root(cell) / "test").glob("*_test.csv"))
    questions: list[Question] = []
    for subject in _chosen(cell, "subjects", cell.subjects, found, "test/<subject>_test.csv"):
        shots = []
        if cell.shots:
            rows = _mmlu_rows(cell, _root(cell) / "dev" / f"{subject}_dev.csv")
            if len(rows) < cell.shots:
                raise Place(cell, "shots").error(f"{subject} has {len(rows)} examples, not {cell.shots}",
                                                 f"at most {len(rows)}")
            shots = [f"{prompt} {_LETTERS[answer]}\n\n" for prompt, answer in rows[: cell.shots]]
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        questions += [
            Question(prompt, answer, tuple(f" {letter}" for letter in _LETTERS), head, tuple(shots), subject)
            for prompt, answer in _mmlu_rows(cell, _root(cell) / "test" / f"{subject}_test.csv")]
    return questions


def _mmlu_rows(cell: MMLU, file: Path) -> list[tuple[str, int]]:
    """Each row as a prompt and the number of its answer, which stands in the file as a letter, or as this number."""
    place, rows = Place(cell, "path"), []
    for line, (question, *choices, answer) in read_csv(place, file, 6):
        if (line, answer) == (1, "answer"):
            continue  # names of the columns, which the authors' own files do not have
        if answer not in (*_LETTERS, "0", "1", "2", "3"):
            raise place.error(f"{file}, line {line}: the answer is {answer!r:.40}, not one of A to D or 0 to 3",
                              "mend the file")
        lines = [question.strip(), *(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True))]
        rows.append(("\n".join([*lines, "Answer:"]), _LETTERS.index(answer) if answer in _LETTERS else int(answer)))
    return rows


# --- GSM8K ----------------------------------------------------------------------------------------


def _gsm8k(cell: GSM8K) -> list[Question]:
    shots: tuple[str, ...] = ()
    if cell.shots:
        solved = _gsm8k_records(cell, "train.jsonl")
        if len(solved) < cell.shots:
            raise Place(cell, "shots").error(f"train.jsonl has {len(solved)} problems, not {cell.shots}")
        shots = tuple(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in solved[: cell.shots])
    return [Question(f"Question: {question}\nAnswer:", answer, shots=shots)
            for question, answer in _gsm8k_records(cell, "test.jsonl")]


def _gsm8k_records(cell: GSM8K, name: str) -> list[tuple[str, str]]:
    place, file = Place(cell, "path"), _root(cell) / name
    records = _fields(place, file, read_json_lines(place, file), ("question", "answer"))
    for index, (_, answer) in enumerate(records):
        if "#### " not in answer:
            raise place.error(f"{file}: record {index} has no `#### <number>` in its answer: {answer[-80:]!r}")
    return [(question, answer) for question, answer in records]


# --- BIG-Bench Hard -------------------------------------------------------------------------------


def _bbh(cell: BBH) -> list[Question]:
    place, root = Place(cell, "path"), _root(cell)
    found = sorted(path.stem for path in (root / "bbh").glob("*.json"))
    questions: list[Question] = []
    for task in _chosen(cell, "tasks", cell.tasks, found, "bbh/<task>.json"):
        head, shots = _bbh_shots(cell, root / "cot-prompts" / f"{task}.txt")
        file = root / "bbh" / f"{task}.json"
        content = read_json(place, file)
        if not isinstance(content, dict) or not isinstance(content.get("examples"), list):
            raise place.error(f"{file} has no list `examples`")
        thought = " Let's think step by step.\n" if cell.style == "cot" else ""
        questions += [Question(f"Q: {asked}\nA:{thought}", target, head=head, shots=shots, group=task)
                      for asked, target in _fields(place, file, content["examples"], ("input", "target"))]
    return questions


def _bbh_shots(cell: BBH, file: Path) -> tuple[str, tuple[str, ...]]:
    """The task's description, and its examples with their chain of thought or with their answers alone."""
    place = Place(cell, "path")
    _, line, text = read_text(place, file).partition("-----\n")
    head, *examples = re.split(r"^(?=Q: )", text.strip(), flags=re.MULTILINE)
    if not (line and examples and all("\nA:" in example for example in examples)):
        raise place.error(f"{file} holds no examples `Q: ...`, `A: ...` after a line `-----`")
    examples = [example.strip() + "\n\n" for example in examples]
    if cell.style == "direct":
        answers = [re.search(r"the answer is (.*)\.\s*$", example, flags=re.IGNORECASE) for example in examples]
        if not all(answers):
            raise place.error(f"{file}: an example does not end with `the answer is ...`")
        examples = [f"{example.partition(chr(10) + 'A:')[0]}\nA: {answer[1]}\n\n"
                    for example, answer in zip(examples, answers, strict=True) if answer]
    return head, tuple(examples)


# --- HumanEval ------------------------------------------------------------------------------------


def _humaneval(cell: HumanEval) -> list[Question]:
    place = Place(cell, "path")
    names = ("task_id", "prompt", "entry_point", "test")
    records = _fields(place, cell.path, read_json_lines(place, cell.path), names)
    return [Question(prompt, "", group=task, fields={"prompt": prompt, "entry_point": entry, "test": test})
            for task, prompt, entry, test in records]


# --- shared ---------------------------------------------------------------------------------------


def _root(cell: Benchmark) -> Path:
    return Path(cell.path).expanduser()


def _fields(place: Place, file: str | Path, records: Sequence[Any], names: Sequence[str]) -> list[list[str]]:
    """These fields of every record, which must be text."""
    for index, record in enumerate(records):
        wrong = next((name for name in names if not isinstance(record, dict) or not isinstance(record.get(name), str)),
                     None)
        if wrong:
            raise place.error(f"{file}: record {index} has no text in `{wrong}`: {record!r:.80}")
    if not records:
        raise place.error(f"{file} holds no records")
    return [[record[name] for name in names] for record in records]


def _chosen(cell: Benchmark, field: str, wanted: Sequence[str], found: Sequence[str], pattern: str) -> Sequence[str]:
    """The wanted names, or all that were found."""
    if not found:
        raise Place(cell, "path").error(f"{cell.path} holds no {pattern}", "name the benchmark's own folder")
    for name in wanted:
        if name not in found:
            close = difflib.get_close_matches(name, found, n=1)
            raise Place(cell, field).error(f"there is no {name!r}", f"did you mean {close[0]!r}?" if close
                                           else "there are: " + ", ".join(found))
    return list(dict.fromkeys(wanted)) or found
