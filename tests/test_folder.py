"""Files of a run folder after a full disk."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from collie_lab.folder import JsonLines, Tail


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
