from __future__ import annotations

import math

import numpy as np
import pytest

from collie_lab.folder import RunFolder
from collie_lab.launch import Run
from collie_lab.view.history import History
from tests.view.fabricate import START, FakeRun, append, end, record


def _history(folder: RunFolder, alive: bool = True) -> History:
    history = History(folder)
    history.update(alive)
    return history


def test_an_empty_folder(folder: RunFolder) -> None:
    history = _history(folder)
    assert (len(history), history.step, history.total, history.status) == (0, 0, None, "running")
    assert history.phase == "starting the processes"
    assert history.eta() is None
    assert history.latest("loss") is None
    assert history.elapsed(START + 5) == 5
    assert len(history.curve("loss").raw) == 0
    assert not history.update()


def test_columns_follow_the_file(folder: RunFolder) -> None:
    history = _history(folder)
    append(folder, "metrics.jsonl", [record(1, 2.0), record(2, float("nan"))])
    assert history.update()
    append(folder, "metrics.jsonl", [{"step": 3, "time": START + 12, "loss": 1.5}])
    assert history.update()
    np.testing.assert_array_equal(history.column("step"), [1, 2, 3])
    np.testing.assert_array_equal(history.column("loss"), [2.0, np.nan, 1.5])
    np.testing.assert_array_equal(history.column("memory_allocated"), [1001, 1002, np.nan])
    assert history.latest("loss") == 1.5
    assert history.latest("lr") is None
    assert history.peak("memory_allocated") == 1002
    assert history.recent("tokens_per_second") == 128.0
    assert not history.update()


def test_rate_and_remaining_time(folder: RunFolder) -> None:
    append(folder, "events.jsonl", [{"time": START, "kind": "start", "steps": 100, "step": 0}])
    # Slow at first, then two steps a second: the estimate follows the latest fifty.
    moments = [START + 10 * step if step <= 20 else START + 200 + (step - 20) / 2 for step in range(1, 81)]
    append(folder, "metrics.jsonl", (record(step, 1.0, moment) for step, moment in enumerate(moments, 1)))
    history = _history(folder)
    assert history.rate == pytest.approx(2.0)
    assert history.eta(moments[-1]) == pytest.approx(10.0)
    assert history.eta(moments[-1] + 4) == pytest.approx(6.0)
    assert history.eta(moments[-1] + 60) == 0.0


def test_one_step_gives_no_estimate(folder: RunFolder) -> None:
    append(folder, "events.jsonl", [{"time": START, "kind": "start", "steps": 100, "step": 0}])
    append(folder, "metrics.jsonl", [record(1)])
    assert _history(folder).eta() is None


def test_a_resumed_run_replaces_the_steps_it_repeats(folder: RunFolder) -> None:
    append(folder, "metrics.jsonl", (record(step, 10.0 + step) for step in range(1, 8)))
    append(folder, "events.jsonl", [{"time": START + step, "kind": "evaluation", "step": step, "perplexity": 9.0}
                                    for step in (3, 6)])
    append(folder, "events.jsonl", [{"time": START + 9, "kind": "start", "steps": 10, "step": 4},
                                    {"time": START + 9, "kind": "evaluation", "step": 5, "perplexity": 5.0}])
    append(folder, "metrics.jsonl", [record(5, 1.0), record(6, 2.0)])
    history = _history(folder)
    np.testing.assert_array_equal(history.column("step"), [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(history.column("loss"), [11, 12, 13, 14, 1, 2])
    np.testing.assert_array_equal(history.evaluated("perplexity"), [[3, 5], [9, 5]])
    append(folder, "events.jsonl", [{"time": START + 12, "kind": "evaluation", "step": 5, "perplexity": 4.0}])
    history.update()
    np.testing.assert_array_equal(history.evaluated("perplexity"), [[3, 5], [9, 4]])
    rows = Run(folder).evaluations
    assert rows.to_dict("list") == {"step": [3, 5], "time": [START + 3, START + 12], "perplexity": [9.0, 4.0]}


def test_evaluations_of_one_step_stand_beside_each_other(folder: RunFolder) -> None:
    append(folder, "events.jsonl", [
        {"time": START, "kind": "evaluation", "step": 5, "perplexity": 4.0},
        {"time": START, "kind": "evaluation", "step": 5, "exact_match": 0.5, "note": "text", "best": True},
        {"time": START, "kind": "evaluation", "step": 9, "note": "no number"},
        {"time": START, "kind": "evaluation", "step": 9, "perplexity": None},
    ])
    history = _history(folder)
    assert [item.values for item in history.evaluations] == [{"perplexity": 4.0}, {"exact_match": 0.5}, {}, {}]
    np.testing.assert_array_equal(history.evaluated("perplexity"), [[5], [4]])
    np.testing.assert_array_equal(history.evaluated("unknown"), [[], []])


def test_phases(folder: RunFolder) -> None:
    history = _history(folder)

    def phase() -> str:
        history.update()
        return history.phase

    append(folder, "events.jsonl", [{"time": START + 1, "kind": "phase", "text": "loading the model"}])
    assert phase() == "loading the model"
    append(folder, "metrics.jsonl", [record(1)])
    assert phase() == ""
    append(folder, "events.jsonl", [{"time": START + 99, "kind": "phase", "text": "evaluating"}])
    assert phase() == "evaluating"
    append(folder, "metrics.jsonl", [record(2, moment=START + 100)])
    assert phase() == ""
    folder.stop_flag.touch()
    assert phase() == "stopping after this step"
    end(folder, "stopped")
    assert phase() == ""


def test_the_end(finished: FakeRun) -> None:
    history = _history(finished.folder, alive=False)
    assert (history.status, history.step, history.elapsed()) == ("ok", 40, 60.0)
    assert history.eta() is None
    assert history.result["exact_match"] == 0.5
    assert history.failures() == []


def test_a_run_without_processes_that_says_running_is_lost(folder: RunFolder) -> None:
    append(folder, "metrics.jsonl", [record(1)])
    history = _history(folder, alive=False)
    assert history.status == "lost"
    assert "logs" in history.detail
    assert history.elapsed() == pytest.approx(10.5)  # up to its last sign of life


def test_failures_are_grouped_and_the_earliest_leads(folder: RunFolder) -> None:
    for rank, moment, message in ((0, 30, "same"), (1, 10, "first"), (2, 20, "same")):
        folder.write(f"errors/rank-{rank}.json", {"rank": rank, "time_ns": moment, "type": "ValueError",
                                                  "message": message, "traceback": "..."})
    end(folder, "error")
    found = _history(folder, alive=False).failures()
    assert [(item.ranks, item.message) for item in found] == [((1,), "first"), ((0, 2), "same")]


def test_curve_of_thousands_of_steps(folder: RunFolder) -> None:
    append(folder, "metrics.jsonl", (record(step, math.sin(step)) for step in range(1, 3001)))
    curve = _history(folder).curve("loss")
    assert len(curve.raw) <= 600
    assert len(curve.smooth) <= 600
