from __future__ import annotations

import html
import re
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from collie_lab import view
from collie_lab.folder import RunFolder
from collie_lab.view.chart import Line, line_chart, nice_ticks, sparkline
from collie_lab.view.history import History
from collie_lab.view.page import _reach, page
from tests.view.fabricate import START, FakeRun, append, beat, end, record


def _page(folder: RunFolder, alive: bool) -> str:
    history = History(folder)
    history.update(alive)
    text = page(history)
    ElementTree.fromstring(text.replace("&nbsp;", " "))  # well-formed, so that no front-end mends it its own way
    return text


def _words(markup: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", _body(markup)))


def _body(markup: str) -> str:
    return re.sub(r"<style>.*?</style>", "", markup)


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (0, 10, [0, 2.5, 5, 7.5, 10]), (1.1, 5.8, [0, 2, 4, 6]), (0.012, 0.019, [0.012, 0.014, 0.016, 0.018, 0.02]),
])
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    np.testing.assert_allclose(nice_ticks(low, high, 4), ticks)


def test_whole_ticks_for_steps() -> None:
    assert nice_ticks(0, 3, 6, whole=True) == [0, 1, 2, 3]


def test_points_lie_where_their_values_are() -> None:
    x, y = np.array([0.0, 50.0, 100.0]), np.array([0.0, 2.0, 4.0])
    svg = line_chart([Line(x, y, "dot", dots=True)], (0, 100), (0, 4), width=158, height=134)
    centres = [(float(a), float(b)) for a, b in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert centres == [(46, 110), (96, 60), (146, 10)]  # the frame is 100 by 100


def test_nan_breaks_a_line() -> None:
    svg = line_chart([Line(np.arange(5.0), np.array([1, 2, np.nan, 3, 4]), "smooth")], (0, 4), (1, 4))
    assert re.search(r'class="smooth" d="([^"]*)"', svg)[1].count("M") == 2  # type: ignore[index]
    assert "nan" not in svg
    assert "nan" not in sparkline(np.array([1, np.nan, 2]))


def test_a_finished_run(finished: FakeRun) -> None:
    words = _words(_page(finished.folder, alive=False))
    for part in (finished.folder.id, " ok ", "step 40/40", "took 1 min 00 s", "perplexity 3.000", "exact match 50.0%",
                 "tokens/s 130", "peak memory 2.00 MB", "learning rate 0.001", "held out (log perplexity)"):
        assert part in words


def test_the_achieved_share_of_the_peak_is_shown_where_it_is_recorded(folder: RunFolder) -> None:
    append(folder, "metrics.jsonl", [record(1, mfu=0.41), record(2, mfu=0.43)])
    assert "MFU 42.0%" in _words(_page(folder, alive=True))


def _meters(markup: str) -> list[float]:
    return [float(width) for width in re.findall(r'class="meter"><div style="width:([\d.]+)%', markup)]


def test_ranks_with_their_memory(folder: RunFolder) -> None:
    append(folder, "metrics.jsonl", [record(7)])
    for rank, memory in enumerate((20e9, 60e9)):
        beat(folder, rank, 7, doing="evaluation" if rank else "step", memory=memory, memory_limit=80e9, on_gpu=True)
    text = _page(folder, alive=True)
    assert _meters(text) == [25.0, 75.0]
    assert "ranks step 7 · memory up to 60.0 GB of 80.0 GB on rank 1 · alive 0 20.0 GB step 7 1 60.0 GB evaluating" \
        in _words(text)
    assert 'class="rank bad"' not in text


def test_the_memory_of_a_process_is_called_so(folder: RunFolder) -> None:
    beat(folder, 0, 3, memory=2e9, memory_limit=4e9)
    assert "ranks step 3 · process memory up to 2.00 GB of 4.00 GB" in _words(_page(folder, alive=True))


@pytest.mark.parametrize(("step", "end"), [(1, 16), (8, 32), (15, 32), (16, 63), (249, 500), (250, 1000)])
def test_the_axis_of_a_long_run_grows_by_doubling(folder: RunFolder, step: int, end: int) -> None:
    append(folder, "events.jsonl", [{"time": 0, "kind": "start", "steps": 1000, "step": 0, "world_size": 1}])
    append(folder, "metrics.jsonl", (record(at) for at in range(1, step + 1)))
    history = History(folder)
    history.update(alive=True)
    assert _reach(history) == (0, end)
    history.update(alive=False)
    assert _reach(history) == (0, 1000)


def test_memory_without_a_limit_is_drawn_against_the_fullest_rank(folder: RunFolder) -> None:
    for rank, memory in enumerate((1e9, None, 2e9)):
        beat(folder, rank, 0, doing="loading", memory=memory)
    assert _meters(_page(folder, alive=True)) == [50.0, 0.0, 100.0]


@pytest.mark.parametrize(("count", "columns"), [(1, 4), (2, 4), (8, 8), (64, 16)])
def test_any_number_of_ranks(folder: RunFolder, count: int, columns: int) -> None:
    folder.write("launch.json", {"world_size": count})
    beat(folder, 0, 1, memory=1e9, memory_limit=4e9)  # the others have not started yet
    text = _page(folder, alive=True)
    assert _meters(text) == [25.0] + [0.0] * (count - 1)
    assert f"repeat({columns}," in text
    assert text.count("not started") >= count - 1


def test_a_silent_rank_stands_out_in_words_and_colour(folder: RunFolder) -> None:
    for rank in range(3):
        beat(folder, rank, 12, doing="evaluation", moment=time.time() - 45 * (rank == 1))
    text = _page(folder, alive=True)
    assert "rank 1: silent for 45 s in step 12, evaluation" in _words(text)
    assert re.findall(r'class="rank( bad)?"', text) == ["", " bad", ""]


@pytest.mark.parametrize(("status", "is_shown"), [("ok", False), ("stopped", False), ("error", True), ("lost", True)])
def test_ranks_of_a_run_that_has_ended_are_shown_if_it_failed(folder: RunFolder, status: str, is_shown: bool) -> None:
    for rank in range(2):
        beat(folder, rank, 12, moment=START)
    folder.write("errors/rank-1.json", {"rank": 1, "time_ns": 1, "type": "ValueError", "message": "no"})
    end(folder, status)
    text = _page(folder, alive=False)
    assert ("as they were last seen" in text) is is_shown
    assert re.findall(r'class="rank( bad)?"', text) == (["", " bad"] if is_shown else [])
    assert "silent" not in _words(text)


def test_a_restart_is_told(folder: RunFolder) -> None:
    append(folder, "events.jsonl", [{"kind": "restart", "time": START, "attempt": 2, "step": 20,
                                     "detail": "rank 1: killed (SIGKILL)"}])
    words = _words(_page(folder, alive=True))
    assert "restarted from step 20 (attempt 2), after rank 1: killed (SIGKILL)" in words


def test_before_the_first_step(folder: RunFolder) -> None:
    append(folder, "events.jsonl", [{"time": 0, "kind": "phase", "text": "loading the <model>"}])
    text = _page(folder, alive=True)
    assert "loading the &lt;model&gt;" in text


def test_a_loss_that_never_was_a_number(folder: RunFolder) -> None:
    append(folder, "metrics.jsonl", [record(step, float("nan")) for step in range(1, 5)])
    end(folder, "diverged")
    text = _page(folder, alive=False)
    assert "no finite loss" in text
    assert "diverged" in text


def test_a_single_step_is_a_dot(folder: RunFolder) -> None:
    append(folder, "metrics.jsonl", [record(1)])
    assert 'class="lone"' in _page(folder, alive=True)


def test_a_failure_is_told_escaped_and_in_red(folder: RunFolder) -> None:
    folder.write("errors/rank-1.json", {"rank": 1, "time_ns": 1, "type": "ValueError", "message": "a <b> & c",
                                        "traceback": "Traceback\n  line 7"})
    append(folder, "events.jsonl", [{"time": 0, "kind": "warning", "text": "half of the tokens are padding"}])
    end(folder, "error", detail="rank 1: exit code 1")
    text = _page(folder, alive=False)
    assert "rank 1: ValueError: a &lt;b&gt; &amp; c" in text
    for part in ("line 7", "rank 1: exit code 1", "half of the tokens are padding", "background:#B3261E"):
        assert part in text


def test_what_ended_a_run_early_is_told_and_is_no_failure(folder: RunFolder) -> None:
    end(folder, "ok", detail="early stopping after step 12: perplexity has not improved")
    text = _page(folder, alive=False)
    assert '<div class="box warn">early stopping after step 12' in text


def test_the_first_failure_is_told_in_full_and_its_consequences_in_a_line(folder: RunFolder) -> None:
    for rank, message in ((1, "no word"), (0, "the peer is gone\n" + "so " * 60)):
        folder.write(f"errors/rank-{rank}.json", {
            "rank": rank, "time_ns": 2 - rank, "type": "ValueError", "message": message,
            "traceback": 'Traceback\n  File "/lib/site-packages/torch/nn.py", line 7\n  File '
                         f'"{tempfile.gettempdir()}/ipykernel_12/345.py", line {rank}\n  File '
                         f'"{Path(view.__file__).parent}/page.py"'})
    end(folder, "error", detail="rank 1: ValueError: no word")
    words = html.unescape(_words(_page(folder, alive=False)))
    assert words.endswith('rank 1: ValueError: no word Traceback File "torch/nn.py", line 7 A cell, line 1 '
                          'File "collie_lab/view/page.py" rank 0: ValueError: the peer is gone' + ' so' * 34 + ' … ')


def test_ten_thousand_steps_stay_light(folder: RunFolder) -> None:
    append(folder, "metrics.jsonl", (record(step, 1 + step % 7) for step in range(1, 10_001)))
    assert len(_page(folder, alive=True)) < 30_000
