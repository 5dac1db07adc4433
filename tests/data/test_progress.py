"""The bar comes only where it pays and can be seen."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import rich

from collie_lab.data import progress
from collie_lab.data.progress import Progress


@pytest.fixture
def shown() -> Iterator[io.StringIO]:
    """What goes to a terminal of 120 columns."""
    console = rich.get_console()
    before, stream = dict(console.__dict__), io.StringIO()
    rich.reconfigure(file=stream, force_terminal=True, width=120)
    yield stream
    console.__dict__.update(before)


def _refuse() -> int:
    raise AssertionError("nobody asked for a bar")


def test_what_is_quick_shows_nothing(shown: io.StringIO) -> None:
    with Progress("tokenizing", _refuse) as bar:
        bar.advance(1)
    assert shown.getvalue() == ""


def test_what_is_slow_shows_how_far_it_is(shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET", -1.0)
    with Progress("tokenizing", lambda: 40) as bar:
        assert list(bar.each("ab")) == ["a", "b"]
        bar.advance(8)
    assert "tokenizing" in shown.getvalue()
    assert "10/40" in shown.getvalue()


def test_a_notebook_gets_a_line_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, str]] = []

    class Display:
        def update(self, data: dict[str, str], **_: Any) -> None:
            sent.append(data)

    moments = itertools.count()  # a second between two looks at the clock
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(moments))
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: Display())
    monkeypatch.setattr(rich.get_console(), "is_jupyter", True)
    monkeypatch.setattr(progress, "_QUIET", -1.0)
    with Progress("<tokenizing>", lambda: 4000) as bar:
        for _ in range(3):
            bar.advance(1000)
    assert [data["text/plain"] for data in sent] == [
        "<tokenizing>: 1,000 of 4,000 documents", "<tokenizing>: 2,000 of 4,000 documents, 4 s left",
        "<tokenizing>: 3,000 of 4,000 documents, 2 s left", ""]
    assert sent[1]["text/html"].startswith('<progress max="4000" value="2000"></progress> &lt;tokenizing&gt;')


def test_a_pipe_gets_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET", -1.0)
    with Progress("tokenizing", _refuse) as bar:
        bar.advance(1)
        bar.advance(1)
    assert capsys.readouterr().out == ""
