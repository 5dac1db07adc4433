from __future__ import annotations

import io
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from collie_lab.folder import RunFolder
from collie_lab.size import Size
from collie_lab.view.comparison import Comparison
from collie_lab.view.history import History
from collie_lab.view.live import watch
from collie_lab.view.page import page
from collie_lab.view.terminal import PlainLines, ProgressLine, moving_lines, several_lines
from tests.view.fabricate import START, FakeRun, append, beat, end, record


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


def test_the_size_is_told_once_and_before_the_first_step(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    history, view, out = History(folder), PlainLines(), io.StringIO()
    moving = ProgressLine(moving_lines(Console(file=out, width=160)))
    size = Size(parameters=1_128_128, trainable=97_600, weight_bytes=4_512_512, gradient_bytes=390_400,
                state_bytes=780_800, matrices=97_600)
    append(folder, "events.jsonl", [{"time": START, "kind": "phase", "text": "loading the model"},
                                    {"time": START + 1, "kind": "start", "steps": 50, "step": 0, **asdict(size)}])
    for _ in range(2):
        history.update()
        view.draw(history)
        moving.draw(history)
    line = "  97,600 of 1,128,128 parameters are trained (8.65%): weights 4.5 MB, gradients 0.4 MB, optimizer 0.8 MB"
    assert capsys.readouterr().out.splitlines() == [line, "  loading the model"]
    assert out.getvalue().count(line) == 1
    assert line.strip() in page(history)


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
    view = ProgressLine(moving_lines(Console(file=out, force_terminal=True, width=120, color_system=None)))
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


def test_plain_lines_of_several_runs(
    finished: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = RunFolder.create(tmp_path, "other")
    end(other, "error", detail="rank 1: exit code 1")
    watch(finished, FakeRun(other), labels=["long", "b"])
    assert capsys.readouterr().out.splitlines() == [
        f"long  run {finished.folder.id} in {tmp_path}",
        f"b     run {other.id} in {tmp_path}",
        "long    step 20: evaluation: perplexity 4.000, exact match 25.0%",
        "long    step 40: evaluation: perplexity 3.000, exact match 50.0%",
        "long    ok: step 40/40 in 1 min 00 s, loss 1.020, perplexity 3.000, exact match 50.0%, tokens/s 130, "
        "peak memory 2.00 MB",
        "b       error: step 0 in 1 min 00 s",
        "b       rank 1: exit code 1",
    ]


def test_a_moving_line_for_each_of_several_runs(finished: FakeRun, folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder.create(tmp_path, "other")
    append(other, "metrics.jsonl", [record(7)])
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    view = several_lines(["long", "b"], moving_lines(console))
    histories = History(finished.folder), History(other)
    comparison = Comparison(("long", "b"), histories)
    histories[0].update()
    view.open(comparison)
    histories[0].update(alive=False)
    histories[1].update()
    view.draw(comparison)  # the first has ended, the second goes on
    assert out.getvalue().count("long    ok: step 40/40") == 1
    assert "b     step 7" in out.getvalue()
    histories[1].update(alive=False)
    view.close(comparison)
    assert out.getvalue().count("long    ok: step 40/40") == 1
    assert "b       lost: step 7" in out.getvalue()


def test_a_rank_that_stands_out_is_announced_once(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        beat(folder, rank, 12, moment=time.time() - 45 * rank)
    history, view = History(folder), PlainLines("a ")
    history.update()
    for _ in range(3):
        view.draw(history)
    assert capsys.readouterr().out == "a   starting the processes\n".join(
        ["a   warning: rank 1: silent for 45 s in step 12\n", ""])
