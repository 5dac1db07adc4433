"""Readers of the formats, splits, and errors that name the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collie_lab import CellError, Instructions, Skills, Text
from collie_lab.data import make_skills, read_documents
from collie_lab.data.records import Split

ALPACA = [{"instruction": "Add.", "input": "1 2", "output": "3"},
          {"instruction": "Say hi.", "input": "", "output": "hi"}]
PAIRS = [{"prompt": "a", "completion": "b"}]
CHAT = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"},
                      {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"},
                      {"role": "assistant", "content": "see you"}]}]


def _texts(cell: Instructions, split: Split = "train") -> list[tuple[tuple[str, bool], ...]]:
    return [document.segments for document in read_documents(cell, split)]


def test_alpaca_with_and_without_input() -> None:
    assert _texts(Instructions(ALPACA, holdout=0)) == [
        (("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", False), ("3", True)),
        (("### Instruction:\nSay hi.\n\n### Response:\n", False), ("hi", True)),
    ]


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
def test_an_input_that_is_missing(missing: object) -> None:
    """NaN is what pandas gives for a field without a value."""
    assert _texts(Instructions([{**ALPACA[1], "input": missing}], holdout=0)) == [
        (("### Instruction:\nSay hi.\n\n### Response:\n", False), ("hi", True))]


def test_prompt_completion_from_a_jsonl_file(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in PAIRS) + "\n", encoding="utf-8")
    assert _texts(Instructions(file, holdout=0)) == [(("a", False), ("b", True))]


def test_csv_files(tmp_path: Path) -> None:
    """Values stay text, and what is empty is no missing number."""
    file = tmp_path / "data.csv"
    file.write_text('prompt,completion\n"a, ""b""","1\n2"\nNA,007\n,x\n', encoding="utf-8")
    assert _texts(Instructions(file, holdout=0)) == [
        (('a, "b"', False), ("1\n2", True)), (("NA", False), ("007", True)), (("", False), ("x", True))]
    file.write_text("id,text\n1,one\n2,two\n", encoding="utf-8")
    assert _texts(Text(file, holdout=0)) == [(("one", True),), (("two", True),)]


def test_chat_learns_every_assistant_message() -> None:
    (document,) = read_documents(Instructions(CHAT, holdout=0), "train")
    assert [text for text, learned in document.segments if learned] == ["hello\n\n", "see you\n\n"]
    assert document.answer == "see you"


def test_what_nobody_answers_is_left_out() -> None:
    record = {"messages": [*CHAT[0]["messages"], {"role": "user", "content": "thanks"}]}
    assert read_documents(Instructions([record], holdout=0), "train") == read_documents(
        Instructions(CHAT, holdout=0), "train")


def test_json_strings_may_hold_line_separators(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert _texts(Instructions(file, holdout=0)) == [(("a\u2028b", False), ("c", True))]


@pytest.mark.parametrize("split", ["train", "all"])
def test_limit_is_a_fair_sample(split: Split) -> None:
    cell = Instructions([{"prompt": str(n), "completion": "x"} for n in range(1000)], holdout=0, limit=100)
    chosen = [int(text) for (text, _), _ in _texts(cell, split)]
    assert chosen == sorted(chosen)
    assert len(chosen) == 100
    assert chosen[-1] > 900


def test_clinc_uses_its_own_splits(tmp_path: Path) -> None:
    file = tmp_path / "clinc.json"
    file.write_text(json.dumps({"train": [["hi there", "greet_user"]], "val": [], "test": [["bye", "goodbye"]]}))
    cell = Instructions(file)
    assert _texts(cell) == [(("Query: hi there\nIntent: ", False), ("greet user", True))]
    assert read_documents(cell, "test")[0].answer == read_documents(cell, "all")[0].answer == "goodbye"


def test_a_callable_source_and_format() -> None:
    cell = Instructions(lambda: [{"q": 1, "a": 2}], holdout=0,
                        format=lambda record: (str(record["q"]), str(record["a"])))
    assert _texts(cell) == [(("1", False), ("2", True))]


def test_a_format_that_fails_is_chained() -> None:
    cell = Instructions([{"turns": ["a", "b"]}, {"turns": ["c"]}], holdout=0,
                        format=lambda record: (record["turns"][0], record["turns"][1]))
    with pytest.raises(CellError, match=r"record 1 cannot be read \(`format` raised IndexError\(.*\)\): \{") as raised:
        read_documents(cell, "train")
    assert isinstance(raised.value.__cause__, IndexError)
    assert raised.value.problems[0].remedy == "mend the record, or the function"
    with pytest.raises(CellError, match=r"record 0 cannot be read \(`format` raised ZeroDivisionError"):
        read_documents(cell.replace(format=lambda record: 1 / 0), "train")
    with pytest.raises(CellError, match=r"record 0 cannot be read \(`format` gave 'one', not \(prompt, response\)\)"):
        read_documents(cell.replace(format=lambda record: "one"), "train")


def test_texts_of_records_in_memory() -> None:
    cell = Text([{"text": "one", "id": 1}, "two"], holdout=0)  # type: ignore[list-item]
    assert [document.segments for document in read_documents(cell, "train")] == [(("one", True),), (("two", True),)]
    assert read_documents(Text(lambda: cell.source, holdout=0), "train") == read_documents(cell, "train")  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(("source", "message"), [
    (["a", {"text": float("nan")}], r"record 1 cannot be read \(its `text` is float\): \{'text': nan\}"),
    (["a", {"title": "b"}], r"record 1 cannot be read \(no string, and no `text` field\)"),
    (["a", "b\ud800"], r"record 1 cannot be read \('\\ud800' after 'b' is half of a surrogate pair"),
])
def test_bad_texts_are_named(source: object, message: str) -> None:
    with pytest.raises(CellError, match=message):
        read_documents(Text(lambda: source), "train")  # type: ignore[arg-type, return-value]


def test_holdout_parts_the_records() -> None:
    cell = Instructions([{"prompt": str(n), "completion": "x"} for n in range(100)], holdout=0.2)
    train, test = ({document.segments[0][0] for document in read_documents(cell, split)} for split in ("train", "test"))
    assert (len(train), len(test)) == (80, 20)
    assert not train & test


def test_text_files(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("one two<|end|>three four<|end|>", encoding="utf-8")
    whole = read_documents(Text(file, separator="<|end|>", holdout=0), "train")
    assert [document.segments[0][0] for document in whole] == ["one two", "three four"]
    single = Text(["word " * 100], holdout=0.1)
    parts = [read_documents(single, split)[0].segments[0][0] for split in ("train", "test")]
    assert "".join(parts) == "word " * 100
    assert len(parts[1]) == pytest.approx(50, abs=6)


@pytest.mark.parametrize(("source", "message"), [
    ("absent.json", "Instructions.source: no such file: absent.json"),
    ([], "holds no records"),
    ([{"instruction": "x"}], "record 0 has no field 'output'"),
    ([*PAIRS, {"prompt": "a"}], "record 1 has no field 'completion'"),
    ([{"question": "x"}], "fit no known format"),
    ([{"prompt": "a", "completion": 3}], "record 0 cannot be read"),
    ([{"instruction": None, "output": "x"}], "record 0 cannot be read"),
    ([*ALPACA, {**ALPACA[0], "input": 3}], "record 2 cannot be read (`input` must be text, not int"),
    ([{**ALPACA[0], "output": float("nan")}], "record 0 cannot be read"),
    ([*PAIRS, {"prompt": "a", "completion": "\ud800"}], "record 1 cannot be read ('.ud800' after '' is half of a"),
    ([{"messages": [{"role": "user", "content": "x"}]}], "no message of the assistant"),
])
def test_bad_records_are_named(source: object, message: str) -> None:
    with pytest.raises(CellError, match=message.replace("(", r"\(")):
        read_documents(Instructions(source), "train")  # type: ignore[arg-type]


def test_bad_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text("[{", encoding="utf-8")
    with pytest.raises(CellError, match=r"broken\.json, line 1, column 3: not valid JSON.*is called so"):
        read_documents(Instructions(file), "train")
    lines = tmp_path / "broken.jsonl"
    lines.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a" "completion": "b"}\n', encoding="utf-8")
    with pytest.raises(CellError, match=r"broken\.jsonl, line 3, column 16: not valid JSON: Expecting ','"):
        read_documents(Instructions(lines), "train")
    for bad, message in (('{"prompt": "a"', "line 2, column 15: not valid JSON: Expecting"),
                         ("[" * 100_000, "line 2: JSON that cannot be read: values within values too deeply"),
                         ("9" * 5000, "line 2: JSON that cannot be read: Exceeds the limit [(]4300")):
        lines.write_bytes(f'{{"prompt": "a", "completion": "b"}}\r\n{bad}\r\n'.encode())
        with pytest.raises(CellError, match=rf"broken\.jsonl, {message}"):
            read_documents(Instructions(lines), "train")
    file.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(CellError, match=r"broken\.json: JSON that cannot be read"):
        read_documents(Instructions(file), "train")
    table = tmp_path / "broken.csv"
    for rows, message in (("Hello, how are you?,Fine\na,b\n", "line 2: 3 values for the 2 columns prompt, completion"),
                          ("a,b\na\n", "line 3: 1 values for the 2"),
                          ('a,"b', "line 2: not valid CSV: unexpected end")):
        table.write_text(f"prompt,completion\n{rows}", encoding="utf-8")
        with pytest.raises(CellError, match=rf"broken\.csv, {message}"):
            read_documents(Instructions(table), "train")
    table.write_text("completion,prompt,completion\na,b,c\n", encoding="utf-8")
    with pytest.raises(CellError, match=r"broken\.csv, line 1: 2 columns are called 'completion'"):
        read_documents(Instructions(table), "train")
    table.write_text("", encoding="utf-8")
    with pytest.raises(CellError, match="holds no records"):
        read_documents(Instructions(table), "train")
    table.write_bytes("prompt,completion\na,Ä\n".encode("latin-1"))
    with pytest.raises(CellError, match="is not UTF-8 text"):
        read_documents(Instructions(table), "train")
    with pytest.raises(CellError, match="is a folder"):
        read_documents(Text(tmp_path), "train")
    file.write_text('"text"', encoding="utf-8")
    with pytest.raises(CellError, match="holds no list of records, but str"):
        read_documents(Text(file), "train")
    file.write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(CellError, match="a JSON object, not a list of records"):
        read_documents(Instructions(file), "train")


def test_skills_are_right_seeded_and_parted() -> None:
    cell = Skills(size=500, test_size=100)
    train, test = make_skills(cell, "train"), make_skills(cell, "test")
    assert (len(train), len(test)) == (500, 100)
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in test}
    assert train == make_skills(cell, "train") != make_skills(cell.replace(seed=1), "train")
    assert make_skills(cell.replace(size=50), "test") == test  # the test split does not hang on the other's size
    other = make_skills(cell.replace(tasks=("copy", "repeat"), size=2000, seed=5), "train")
    assert not {prompt for prompt, _ in other} & {prompt for prompt, _ in test}  # nor on the tasks
    for prompt, answer in train + test:
        assert answer == _solve(prompt), prompt


def _solve(prompt: str) -> str:
    """A second implementation of the tasks, from the prompt alone."""
    words = prompt.split()
    match words:
        case ["copy", word]:
            return word
        case ["reverse", word]:
            return "".join(reversed(word))
        case ["uppercase", word]:
            return word.upper()
        case ["first", "letter", "of", word]:
            return word[:1]
        case ["last", "letter", "of", word]:
            return word[-1:]
        case ["number", "after", number]:
            return f"{int(number) + 1}"
        case ["add", a, "and", b]:
            return f"{int(a) + int(b)}"
        case ["count", letter, "in", word]:
            return str(sum(char == letter for char in word))
        case ["longest", "of", *rest]:
            return max(rest, key=len)
        case ["repeat", times, "times", word]:
            return "".join([word] * int(times))
    raise AssertionError(prompt)


def test_too_few_different_prompts() -> None:
    with pytest.raises(CellError, match="too few different prompts for 20000 records"):
        make_skills(Skills(tasks=("add",), size=20000), "train")


def test_real_files(shared: Path) -> None:
    clinc = Instructions(shared / "data/clinc150/data_full.json")
    assert [len(read_documents(clinc, split)) for split in ("train", "test")] == [15000, 4500]
    alpaca = Instructions(shared / "data/alpaca-subsets/random_9k.json")
    assert sum(len(read_documents(alpaca, split)) for split in ("train", "test")) == 9229
