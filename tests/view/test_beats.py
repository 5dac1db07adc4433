from __future__ import annotations

import pytest

from collie_lab.folder import RunFolder
from collie_lab.view.beats import Beats
from collie_lab.view.facts import trouble_texts
from collie_lab.view.history import History
from tests.view.fabricate import START, append, beat, record


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("collie_lab.view.beats.time.time", lambda: START + made.now)
    return made


@pytest.fixture
def beats(folder: RunFolder, clock: Clock) -> Beats:
    return Beats(folder, clock)


def _after(beats: Beats, clock: Clock, seconds: float) -> Beats:
    clock.now += seconds
    beats.update()
    return beats


def _words(beats: Beats, step_seconds: float | None = None) -> list[str]:
    return trouble_texts(beats.troubles(step_seconds), len(beats.latest))


def test_an_older_run_has_no_beats(beats: Beats) -> None:
    beats.update()
    assert beats.latest == {}
    assert beats.troubles(1.0) == []


def test_what_a_rank_says(folder: RunFolder, beats: Beats) -> None:
    beat(folder, 1, 12, doing="evaluation", moment=START + 98, memory=5e9, memory_limit=8e9)
    beats.update()
    found = beats.latest[1]
    assert (found.step, found.doing, found.memory, found.limit, found.process) == (12, "evaluation", 5e9, 8e9, ("a", 2))
    assert beats.silence(1) == pytest.approx(2.0)


@pytest.mark.parametrize("text", ["", '{"rank": 0, "st', "[]", '{"rank": 0}', "{}}"])
def test_a_file_half_written_leaves_what_was_said_before(
    folder: RunFolder, beats: Beats, clock: Clock, text: str
) -> None:
    beat(folder, 0, 3)
    beats.update()
    folder.beat(0).write_text(text)
    assert _after(beats, clock, 1.0).latest[0].step == 3


def test_the_files_are_read_now_and_then(folder: RunFolder, beats: Beats, clock: Clock) -> None:
    beat(folder, 0, 1)
    beats.update()
    beat(folder, 0, 2)
    assert _after(beats, clock, 0.1).latest[0].step == 1
    beats.update(now=True)
    assert beats.latest[0].step == 2


def test_silence_is_counted_on_the_clock_of_the_reader(folder: RunFolder, beats: Beats, clock: Clock) -> None:
    for step in (1, 2):
        beat(folder, 0, step, moment=START - 500)  # another machine's clock, slow by minutes
        _after(beats, clock, 1.0)
    assert beats.silence(0) == 0.0
    assert _after(beats, clock, 7.0).silence(0) == pytest.approx(7.0)


def test_a_silent_rank_stands_out(folder: RunFolder, beats: Beats, clock: Clock) -> None:
    for rank in range(4):
        beat(folder, rank, 12, doing="evaluation" if rank == 3 else "step", moment=START + 100)
    beats.update()
    clock.now += 45
    for rank in range(3):
        beat(folder, rank, 12, count=99)
    beats.update()
    assert _words(beats) == ["rank 3: silent for 45 s in step 12, evaluation"]
    assert _words(beats, step_seconds=4.0) == ["rank 3: silent for 45 s in step 12, evaluation"]
    assert _words(beats, step_seconds=5.0) == []  # ten steps' time have not passed
    assert [item.silent for item in beats.troubles(None)] == [pytest.approx(45.0)]


def test_of_many_silent_ranks_the_first_is_named(folder: RunFolder, beats: Beats, clock: Clock) -> None:
    for rank, since in enumerate((40, 60, 50)):
        beat(folder, rank, 12, doing="loading" if rank == 1 else "step", moment=START + clock.now - since)
    beats.update()
    assert _words(beats) == ["all 3 ranks are silent; the first was rank 1, 1 min 00 s ago while loading"]
    beat(folder, 0, 12, count=99)
    _after(beats, clock, 1.0)
    assert trouble_texts(beats.troubles(None), 3, limit=1) == ["rank 1: silent for 1 min 01 s while loading",
                                                               "and 1 more rank"]


def test_a_rank_that_stays_behind_stands_out(folder: RunFolder, beats: Beats, clock: Clock) -> None:
    for step in range(1, 8):
        beat(folder, 0, step)
        beat(folder, 1, min(step, 4), count=step)  # it lives, and does not get on
        _after(beats, clock, 2.0)
    assert _words(beats, step_seconds=1.0) == ["rank 1: still in step 4, 3 steps behind the others"]
    assert _words(beats, step_seconds=3.0) == []  # three steps' time have not passed
    beat(folder, 1, 7)
    assert _words(_after(beats, clock, 1.0), step_seconds=1.0) == []


def test_who_is_done_is_in_no_trouble(folder: RunFolder, beats: Beats) -> None:
    beat(folder, 0, 5, doing="done", moment=START - 100)
    beat(folder, 1, 6, doing="done", moment=START - 100)
    beats.update()
    assert _words(beats) == []


def test_a_restart_forgets_the_processes_before_it(folder: RunFolder) -> None:
    append(folder, "metrics.jsonl", [record(step, moment=START + step) for step in range(1, 30)])
    beat(folder, 0, 29)
    history = History(folder)
    history.update()
    assert history.rate == pytest.approx(1.0)
    append(folder, "events.jsonl", [{"kind": "restart", "time": START + 40, "attempt": 2, "step": 20,
                                     "detail": "rank 1: killed (SIGKILL)"}])
    history.update()
    history.beats.update(now=True)
    assert history.warnings == ["restarted from step 20 (attempt 2), after rank 1: killed (SIGKILL)"]
    assert (history.phase, history.rate, history.beats.latest) == ("restarting the processes", None, {})
    beat(folder, 0, 20, pid=77)
    history.beats.update(now=True)
    assert history.beats.latest[0].step == 20
    append(folder, "metrics.jsonl", [record(step, moment=START + 60 + 2 * step) for step in range(21, 25)])
    history.update()
    assert (history.step, history.phase, history.rate) == (24, "", pytest.approx(0.5))


def test_a_restart_from_the_beginning(folder: RunFolder) -> None:
    append(folder, "events.jsonl", [{"kind": "restart", "time": START, "attempt": 3, "step": 0, "detail": ""}])
    history = History(folder)
    history.update()
    assert history.warnings == ["restarted from the beginning (attempt 3)"]
