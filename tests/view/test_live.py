from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from collie_lab.folder import RunFolder
from collie_lab.view import live, watch
from collie_lab.view.comparison import Comparison
from collie_lab.view.history import History
from tests.processes import wait_until
from tests.view.fabricate import FakeRun, append, end, record

pytestmark = pytest.mark.signals


class Recorder:
    """A view that only counts."""

    interval = 0.2

    def __init__(self) -> None:
        self.draws: list[int] = []
        self.last = -1
        self.lives_on = True

    def open(self, history: History) -> None:
        pass

    def draw(self, history: History) -> None:
        self.draws.append(history.step)

    def interrupted(self) -> bool:
        return self.lives_on

    def close(self, history: History) -> None:
        self.last = history.step


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    view = Recorder()
    monkeypatch.setattr(live, "_view_for", lambda *_: view)
    return view


def test_a_thousand_records_a_second_make_few_updates(
    recorder: Recorder, write_slowly: Callable[..., FakeRun]
) -> None:
    began = time.monotonic()
    watch(write_slowly(1000, rate=1000))
    assert 1 <= len(recorder.draws) <= (time.monotonic() - began) / recorder.interval
    assert recorder.draws == sorted(set(recorder.draws))
    assert recorder.last == 1000


def test_what_is_written_last_is_drawn(recorder: Recorder, folder: RunFolder) -> None:
    class Ending(FakeRun):
        @property
        def alive(self) -> bool:  # the last record comes together with the end
            append(self.folder, "metrics.jsonl", [record(7)])
            end(self.folder)
            return False

    watch(Ending(folder))
    assert recorder.last == 7


def test_an_interrupt_ends_the_waiting_and_not_the_picture(recorder: Recorder, folder: RunFolder) -> None:
    run = FakeRun(folder)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        watch(run, stops=True)
    timer.join()
    assert recorder.last == -1
    append(folder, "metrics.jsonl", [record(3)])
    end(folder, "stopped")
    watch(run, stops=True)  # joins the picture that is there
    assert recorder.last == 3
    assert not live._interrupted


@pytest.mark.parametrize("lives_on", [True, False])
def test_who_only_watches_can_leave_and_the_run_goes_on(recorder: Recorder, folder: RunFolder, lives_on: bool) -> None:
    recorder.lives_on = lives_on
    append(folder, "metrics.jsonl", [record(3)])
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt, match="the watching has ended, the run goes on"):
        watch(FakeRun(folder))
    timer.join()
    assert recorder.last == (-1 if lives_on else 3)
    assert not folder.stop_flag.exists()
    end(folder)
    if lives_on:
        wait_until(lambda: recorder.last == 3, 10)


def test_several_runs_are_watched_until_the_last_has_ended(
    recorder: Recorder, folder: RunFolder, finished: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Comparison] = []
    other = RunFolder.create(folder.path.parent, "other")
    other.write("status.json", {"status": "running"})
    monkeypatch.setattr(recorder, "open", shown.append)
    monkeypatch.setattr(recorder, "draw", lambda comparison: end(other) if not finished.alive else None)
    monkeypatch.setattr(recorder, "close", shown.append)
    monkeypatch.setattr(live, "_view_for_several", lambda *_: recorder)
    watch(finished, FakeRun(other), labels=["a", "b"])
    assert shown[0] is shown[1]
    assert shown[0].labels == ("a", "b")
    assert [history.status for history in shown[0].histories] == ["ok", "ok"]


def test_watch_says_what_is_wrong(finished: FakeRun) -> None:
    with pytest.raises(ValueError, match="watch: there are no runs to watch"):
        watch()
    with pytest.raises(ValueError, match="watch: 1 labels for 2 runs"):
        watch(finished, finished, labels=["a"])
    with pytest.raises(ValueError, match=r"watch takes runs one by one, watch\(a, b\), got \["):
        watch([finished, finished])  # type: ignore[arg-type]


def test_without_waiting_it_returns_at_once(recorder: Recorder, folder: RunFolder) -> None:
    run = FakeRun(folder)
    watch(run, wait=False)
    assert recorder.last == -1
    end(folder)
    wait_until(lambda: recorder.last == 0, 10)


@pytest.mark.filterwarnings("always")
def test_a_broken_picture_hurts_neither_run_nor_waiting(
    recorder: Recorder, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(history: History) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(recorder, "close", broken)
    end(folder)
    with pytest.warns(UserWarning, match="no ink"):
        watch(FakeRun(folder))


def test_nothing_is_shown_without_waiting_outside_a_notebook(
    finished: FakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(finished, wait=False)
    assert capsys.readouterr().out == ""


def test_the_import_is_cheap() -> None:
    heavy = "{'torch', 'numpy', 'matplotlib', 'IPython', 'ipywidgets', 'rich', 'pandas'}"
    code = f"import sys; before = set(sys.modules); import collie_lab.folder, collie_lab; " \
           f"known = set(sys.modules); import collie_lab.view; print({heavy} & (set(sys.modules) - known))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()"
