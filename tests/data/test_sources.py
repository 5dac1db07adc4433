"""Where records come from: the same records from every kind of source, and errors that name the place."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from collie_lab import CellError, Data, Experiment, Instructions, Model, Text, Training
from collie_lab.data import read_documents, sources

RECORDS = [{"prompt": f"{number} ü?", "completion": "x" * number} for number in range(30)]
TEXTS = [{"id": number, "text": f"story {number}"} for number in range(30)]


def _jsonl(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder with the records as files of every kind."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(RECORDS)
    table.to_parquet(tmp_path / "data.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "validation": table.select(range(3))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "train.jsonl").write_text(_jsonl(RECORDS), encoding="utf-8")
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(_jsonl(RECORDS).encode()))
    (tmp_path / "data.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    (tmp_path / "marked.json").write_text(json.dumps(RECORDS), encoding="utf-8-sig")
    for part in range(3):
        (tmp_path / f"part-{part}.jsonl").write_text(_jsonl(RECORDS[part * 10 : part * 10 + 10]), encoding="utf-8")
    return tmp_path


def test_every_source_gives_the_same_documents(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(written / "cache"))
    expected = {split: read_documents(Instructions(RECORDS, holdout=0.2), split) for split in ("train", "test")}
    for source in ("data.parquet", "data.jsonl.gz", "data.json.gz", "marked.json", "part-*.jsonl", "hf:saved",
                   "hf:splits?split=train&test=train", lambda: iter(RECORDS), lambda: (record for record in RECORDS)):
        cell = Instructions(source, holdout=0.2)
        if source == "hf:splits?split=train&test=train":  # a test split of its own
            assert read_documents(cell, "test") == read_documents(Instructions(RECORDS), "all")
            continue
        assert {split: read_documents(cell, split) for split in ("train", "test")} == expected, source


def test_data_sets_with_splits_of_their_own(written: Path) -> None:
    whole = read_documents(Instructions(RECORDS), "all")
    assert read_documents(Instructions("hf:splits"), "train") == whole
    assert read_documents(Instructions("hf:splits"), "test") == whole[:3]
    for source, message in (("hf:splits?split=dev", "it has no split 'dev' → its splits are train, validation"),
                            ("hf:splits?branch=x", "unknown keys branch → after `[?]` stand name, split")):
        with pytest.raises(CellError, match=message):
            read_documents(Instructions(source), "train")


def test_a_data_set_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_: Any, **options: Any) -> None:
        raise ConnectionError(f"offline: {options}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(CellError, match=r"hf:a/b\?name=c.*does not load: ConnectionError.*'c'.*check the name and "):
        read_documents(Instructions("hf:a/b?name=c"), "train")


def test_texts_of_parquet(tmp_path: Path) -> None:
    pytest.importorskip("datasets").Dataset.from_list(TEXTS).to_parquet(tmp_path / "text.parquet")
    documents = read_documents(Text(tmp_path / "text.parquet", holdout=0), "train")
    assert [document.segments[0][0] for document in documents] == [record["text"] for record in TEXTS]


def test_separators_between_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CHUNK", 5)
    (tmp_path / "a.txt").write_text("one<|end|>two and more<|end|><|end|>three", encoding="utf-8")
    documents = read_documents(Text(tmp_path / "a.txt", separator="<|end|>", holdout=0), "train")
    assert [document.segments[0][0] for document in documents] == ["one", "two and more", "three"]


def test_a_separator_that_parts_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CHUNK", 5)
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one<|end|>", encoding="utf-8")
    lines.write_text('{"text": "a<|end|>b"}\n', encoding="utf-8")
    experiment = Experiment(model=Model("llama-tiny", init="random"), data=Text(text, separator="<|end|>"),
                            training=Training(steps=1, batch_size=1))
    assert experiment.check().problems == []
    for source, separator, message in (
            (text, "<|END|>", f"'<|END|>' stands nowhere in {text}: a whole file is one document → what stands there"),
            (lines, "<|end|>", f"without effect: {lines} holds records, and each is a document → leave it out"),
            (["a<|end|>b"], "<|end|>", "without effect: the source is no text file → leave it out")):
        report = experiment.replace(data=Text(source, separator=separator)).check()
        assert report.ok
        assert f"Text.separator: {message}" in str(report.warnings[0])


def test_a_generator_is_read_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """More records than are kept in memory come from a file, as often as they are wanted."""
    calls = []

    def records() -> Iterator[dict[str, Any]]:
        calls.append(1)
        yield from RECORDS

    monkeypatch.setattr(sources, "_IN_MEMORY", 10)
    source = sources.open_source(Instructions(records))
    assert list(source.train) == list(source.train) == RECORDS
    assert list(zip(source.train, source.train, strict=True)) == list(zip(RECORDS, RECORDS, strict=True))
    assert calls == [1]


def test_a_generator_object_is_refused() -> None:
    with pytest.raises(CellError, match="a generator can be read only once, and cannot travel: give the function"):
        Instructions(record for record in RECORDS)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cell", "source", "message"), [
    (Instructions, pd.DataFrame(RECORDS), 'a DataFrame is no list of records → df.to_dict("records")'),
    (Text, pd.DataFrame(TEXTS), 'a DataFrame is no list of records → df.to_dict("records")'),
    (Instructions, [RECORDS[0], ("a", "b")], "item 1 of the list is not a record, got ('a', 'b') → "
     '{"prompt": ..., "completion": ...}, as df.to_dict("records") has them'),
    (Text, [("a", "b")], "item 0 of the list is not a text or a record, got ('a', 'b') → {\"text\": ...}"),
])
def test_what_is_no_list_of_records_is_one_problem(cell: type[Any], source: Any, message: str) -> None:
    with pytest.raises(CellError) as caught:
        cell(source)
    assert str(caught.value) == f"{cell.__name__}.source: {message}"


def test_a_function_that_fails_on_the_way() -> None:
    def records() -> Iterator[dict[str, Any]]:
        yield RECORDS[0]
        raise OSError("the disk is gone")

    with pytest.raises(CellError, match=r"raised OSError\('the disk is gone'\)"):
        read_documents(Instructions(records), "train")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe4"}\n', "line 2, byte 13 is 0xE4 → iconv -f LAT"),
    ("a.txt", "one\ntwo ü\n".encode("latin-1"), "line 2, byte 5 is 0xFC"),
    ("a.csv", "prompt\nü\n".encode("utf-16"), "line 1, byte 1 is 0xFF → iconv -f UTF-16 "),
    ("a.txt", "hello".encode("utf-16-le"), "is not UTF-8 text: line 1, byte 2 is 0x00 → iconv -f UTF-16LE"),
    ("a.json", b'[{"prompt": "a", "completion": "b"}]'.decode().encode("utf-16-be"), "0x00 → iconv -f UTF-16BE"),
    ("a.csv", "prompt,completion\na,b".encode("utf-16-le"), "0x00 → iconv -f UTF-16LE"),
    ("a.jsonl.gz", gzip.compress(b'\n{"prompt": "a\0", "completion": "b"}\n', mtime=0), "line 2, byte 14 is 0x00"),
    ("b.jsonl", b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}', "b.jsonl, line 3: has no field 'completion'"),
    ("b.json", b'[{"prompt": "a", "completion": "\\ud800"}]', "record 0 cannot be read .'.ud800' after '' is half of"),
    ("a.jsonl.gz", gzip.compress(b"\n" * 9999, mtime=0)[:-12], "damaged gzip"),
    ("a.json.gz", b"[]", "damaged gzip"),
    ("a.parquet", b"PAR1 and no more", "not a whole Parquet file"),
    ("b-*.jsonl", b"", "no such file"),
])
def test_bad_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if "*" not in name:
        (tmp_path / name).write_bytes(content)
    cell: Data = Text(tmp_path / name) if name.endswith("txt") else Instructions(tmp_path / name)
    with pytest.raises(CellError, match=message):
        read_documents(cell, "train")
    report = Experiment(model=Model("llama-tiny", init="random"), data=cell).check()
    assert [problem.cell for problem in report.errors] == [type(cell).__name__]


def test_the_ending_tells_the_format(tmp_path: Path) -> None:
    lines, whole = _jsonl(RECORDS).encode(), json.dumps(RECORDS).encode()
    for name, content in (("A.JSONL", lines), ("B.Jsonl.GZ", gzip.compress(lines)), ("C.JSON", whole), ("d", whole)):
        (tmp_path / name).write_bytes(content)
        assert len(read_documents(Instructions(tmp_path / name, holdout=0), "train")) == len(RECORDS)
    (tmp_path / "d.tsv").write_text("prompt\tcompletion\na\tb\n", encoding="utf-8")
    with pytest.raises(CellError, match=r".tsv is read as JSON; the endings of other formats: .jsonl, .csv, .parq"):
        read_documents(Instructions(tmp_path / "d.tsv"), "train")


def test_a_record_of_several_files_is_named_in_its_own(written: Path) -> None:
    (written / "part-1.jsonl").write_text(_jsonl(RECORDS[:3]) + '\n{"prompt": "a"}\n', encoding="utf-8")
    with pytest.raises(CellError, match=r"part-1\.jsonl, line 5: has no field 'completion'"):
        read_documents(Instructions(written / "part-*.jsonl"), "train")
    (written / "a.csv").write_text("prompt,completion\nx,y\nx,y\n", encoding="utf-8")
    (written / "b.csv").write_text("prompt,response\nx,y\n", encoding="utf-8")
    with pytest.raises(CellError, match=r"b\.csv: record 0 has no field 'completion'"):
        read_documents(Instructions(written / "?.csv"), "train")


@pytest.mark.parametrize(("messages", "message"), [
    ([{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}], "unknown role 'narrator'"),
    ([{"role": "user", "content": ["x"]}, {"role": "assistant", "content": "y"}], "must be text, not list"),
    ([{"role": "user"}, {"role": "assistant", "content": "y"}], "record 0 has no field 'content'"),
    ([{"from": "human", "value": "x"}], "record 0 has no field 'role'"),
    ([], "no message of the assistant"),
    (None, "cannot be read"),
])
def test_chats_that_are_none(messages: Any, message: str) -> None:
    with pytest.raises(CellError, match=message):
        read_documents(Instructions([{"messages": messages}]), "train")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (500, 5000):
        file = tmp_path / f"{count}.jsonl"
        file.write_text(_jsonl([{"text": f"{number} " * 200} for number in range(count)]), encoding="utf-8")
        tracemalloc.start()
        assert sum(1 for _ in sources.open_source(Text(file)).train) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < file.stat().st_size / 5
