"""Files of a run folder: after a full disk, and with text that no UTF-8 has."""

from __future__ import annotations

import errno
import resource
from pathlib import Path
from typing import Any

import pytest

import collie_lab as lab
from collie_lab.folder import JsonLines, RunFolder, Tail
from tests.study.grids import toy_grid


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = RunFolder.create("~/runs", "a")
    folder.write("launch.json", {})
    assert folder.path.parent == tmp_path / "home" / "runs"
    assert [run.id for run in lab.runs("~/runs")] == [folder.id]
    assert lab.attach(f"~/runs/{folder.id}").id == lab.attach(folder.id, "~/runs").id == folder.id
    experiment = lab.Experiment(model="llama-tiny")
    experiment.to_yaml("~/e.yaml")
    assert lab.Experiment.from_yaml("~/e.yaml") == lab.Experiment.from_yaml(Path("~/e.yaml")) == experiment
    assert lab.Study(toy_grid([0]), results="~/study").results == tmp_path / "home" / "study"
    assert not (tmp_path / "~").exists()


def test_a_line_that_a_full_disk_has_cut_is_told_and_later_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines, limits = JsonLines(path), resource.getrlimit(resource.RLIMIT_FSIZE)
    lines.append({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            lines.append({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines.close()
    assert path.read_bytes() == b'{"step": 1}\n{"st'
    tail = Tail(path)
    assert list(tail.new()) == [{"step": 1}]
    for step in (2, 3):
        lines = JsonLines(path)
        lines.append({"step": step})
        lines.close()
    assert list(tail.new()) == [{"step": 2}, {"step": 3}]
    assert list(Tail(path).new()) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_file_with_nothing_but_a_cut_line_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"ki')
    lines = JsonLines(path)
    lines.append({"kind": "start"})
    lines.close()
    assert list(Tail(path).new()) == [{"kind": "start"}]


def test_half_characters_come_back(tmp_path: Path) -> None:
    record = {"text": "a \ud800 \U0001f600"}
    folder, lines = RunFolder(tmp_path), JsonLines(tmp_path / "lines.jsonl")
    folder.write("a.json", record)
    lines.append(record)
    lines.close()
    assert folder.read("a.json") == record
    assert list(Tail(tmp_path / "lines.jsonl").new()) == [record]


def test_on_a_full_disk_there_is_room_for_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, write = RunFolder(tmp_path), RunFolder.write

    def full(self: RunFolder, name: str, value: dict[str, Any]) -> None:
        if (tmp_path / ".spare").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, value)

    folder.reserve()
    monkeypatch.setattr(RunFolder, "write", full)
    with pytest.raises(OSError, match="No space"):
        folder.write("status.json", {"status": "error"})
    folder.insist("status.json", {"status": "error"})
    assert folder.read("status.json") == {"status": "error"}
