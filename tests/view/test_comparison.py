from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from collie_lab.folder import RunFolder
from collie_lab.view.comparison import Comparison, comparison_page, comparison_text
from collie_lab.view.history import History
from collie_lab.view.style import COLORS, DARK_COLORS
from tests.view.fabricate import START, FakeRun, append, beat, end, record


def _comparison(*folders: RunFolder, labels: tuple[str, ...] = ("first", "b <2>")) -> Comparison:
    histories = tuple(History(folder) for folder in folders)
    for history in histories:
        history.update(FakeRun(history.folder).alive)
    return Comparison(labels, histories)


def _rows(markup: str) -> list[list[str]]:
    """The words of every cell of the table, row by row."""
    root = ElementTree.fromstring(markup)  # well-formed, so that no front-end mends it its own way
    return [[" ".join("".join(cell.itertext()).split()) for cell in row] for row in root.iter("tr")]


@pytest.fixture
def other(tmp_path: Path) -> RunFolder:
    """A run that is at step 20 of 80, two steps a second."""
    created = RunFolder.create(tmp_path, "other")
    now = time.time()
    created.write("status.json", {"status": "running", "started": now - 20})
    append(created, "events.jsonl", [{"kind": "start", "time": now - 10, "steps": 80, "step": 0}])
    append(created, "metrics.jsonl", (record(step, 2.0, now - 9.8 + step / 2) for step in range(1, 21)))
    return created


def test_a_row_a_run(finished: FakeRun, other: RunFolder) -> None:
    head, first, second = _rows(comparison_page(_comparison(finished.folder, other)))
    assert head == ["run", "", "progress", "time", "loss", "held out", "tokens/s", "peak memory"]
    assert first == ["first", "ok", "step 40/40", "took 1 min 00 s", "1.020", "perplexity 3.000exact match 50.0%",
                     "130", "2.00 MB"]
    assert second == ["b <2>", "running", "step 20/80", "30 s left", "2.000", "–", "128", "1.02 kB"]


def test_a_curve_a_run_in_its_colour(finished: FakeRun, other: RunFolder) -> None:
    text = comparison_page(_comparison(finished.folder, other))
    assert re.findall(r'<path class="([^"]*)"', text) == ["c1 d0", "c0 d0"]
    assert f"--c0:{COLORS[0]}" in text
    assert f"--c0:{DARK_COLORS[0]}" in text
    assert len(DARK_COLORS) == len(COLORS)
    assert re.findall(r'class="bar"><div style="width:([\d.]+)%', text) == ["100.00", "25.00"]


def test_more_runs_than_colours_are_told_apart_by_dashes(finished: FakeRun) -> None:
    count = len(COLORS) + 2
    text = comparison_page(_comparison(*[finished.folder] * count, labels=tuple(map(str, range(count)))))
    styles = re.findall(r'<path class="([^"]*)"', text)
    assert len(set(styles)) == count
    assert "c1 d1" in styles


def test_before_the_first_step_and_of_a_single_step(folder: RunFolder) -> None:
    assert "no step yet" in comparison_page(_comparison(folder, labels=("a",)))
    append(folder, "metrics.jsonl", [record(1)])
    assert '<circle class="c0 d0"' in comparison_page(_comparison(folder, labels=("a",)))


def test_what_needs_a_look_is_said_with_the_label(folder: RunFolder, other: RunFolder) -> None:
    for rank in range(2):
        beat(other, rank, 20, moment=time.time() - 45 * rank)
    append(folder, "metrics.jsonl", [record(1)])
    end(folder, "cuda_oom", detail="rank 1: out of GPU memory")
    text = comparison_page(_comparison(folder, other, labels=("a", "b")))
    assert "a: rank 1: out of GPU memory" in text
    assert "b: rank 1: silent for 45 s in step 20" in text


def test_the_text_has_a_line_a_run(finished: FakeRun, folder: RunFolder) -> None:
    end(folder, "lost", detail="")
    first, second = comparison_text(_comparison(finished.folder, finished.folder)).splitlines()
    assert first.startswith("first: ")
    assert second.startswith("b <2>: ")


def test_many_steps_stay_light(folder: RunFolder) -> None:
    append(folder, "metrics.jsonl", (record(step, 1 + step % 7, START + step) for step in range(1, 10_001)))
    assert len(comparison_page(_comparison(*[folder] * 8, labels=tuple("abcdefgh")))) < 60_000
