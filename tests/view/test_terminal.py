from __future__ import annotations

import io

import pytest
from rich.console import Console

from collie_lab.folder import RunFolder
from collie_lab.view.history import History
from collie_lab.view.live import watch
from collie_lab.view.terminal import PlainLines, ProgressLine
from tests.view.fabricate import START, FakeRun, append, end, record


def test_plain_lines_of_a_finished_run(finished: FakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    watch(finished)
    assert capsys.readouterr().out.splitlines() == [
        f"run {finished.folder.id} in {finished.folder.path.parent}",
        "  step 20: evaluation: perplexity 4.000, exact match 25.0%",
        "  step 40: evaluation: perplexity 3.000, exact match 50.0%",
        "  ok: step 40/40 in 1 min 00 s, loss 1.020, perplexity 3.000, exact match 50.0%, tokens/s 130, "
        "peak memory 2.00 MB",
    ]


def test_plain_lines_come_every_tenth_of_the_steps(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    history, view = History(folder), PlainLines()
    append(folder, "events.jsonl", [{"time": START, "kind": "phase", "text": "loading the model"}])
    history.update()
    view.open(history)
    view.draw(history)
    append(folder, "events.jsonl", [{"time": START + 1, "kind": "start", "steps": 50, "step": 0}])
    for step in range(1, 51):
        append(folder, "metrics.jsonl", [record(step)])
        history.update()
        view.draw(history)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  loading the model"
    assert [line.split()[1] for line in lines[2:]] == [f"{step}/50" for step in range(1, 50, 5)]
    assert lines[2].startswith("  step 1/50    loss 1.000   lr 0.0010   128 tok/s   1.00 kB")


def test_plain_lines_of_a_failure(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write("errors/rank-1.json", {"rank": 1, "time_ns": 1, "type": "KeyError", "message": "'x'"})
    append(folder, "events.jsonl", [{"time": START, "kind": "warning", "text": "half is padding"}])
    end(folder, "error", detail="rank 1: exit code 1")
    watch(FakeRun(folder))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  warning: half is padding",
        "  error: step 0 in 1 min 00 s",
        "  rank 1: exit code 1",
        "  rank 1: KeyError: 'x'",
    ]


def test_the_progress_line_of_a_terminal(finished: FakeRun) -> None:
    out = io.StringIO()
    view = ProgressLine(Console(file=out, force_terminal=True, width=120, color_system=None))
    history = History(finished.folder)
    history.update()
    view.open(history)
    view.draw(history)
    history.update(alive=False)
    view.close(history)
    text = out.getvalue()
    assert "step 40/40" in text
    assert "loss 1.018" in text
    assert text.count("step 20: evaluation: perplexity 4.000") == 1
    assert "ok: step 40/40 in 1 min 00 s" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is visible
