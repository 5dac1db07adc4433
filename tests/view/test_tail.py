from __future__ import annotations

import re
from typing import Any

import pytest

from collie_lab.folder import RunFolder
from collie_lab.view.tail import LogTail
from tests.view.displays import Displays


@pytest.fixture
def displays(monkeypatch: pytest.MonkeyPatch) -> Displays:
    made = Displays()
    monkeypatch.setattr("IPython.display.display", made)
    return made


def _lines(bundle: dict[str, Any]) -> list[list[str]]:
    return [text.split("\n") for text in re.findall(r'<pre class="code">(.*?)</pre>', bundle["text/html"], re.S)]


def test_the_fold_stays_and_its_text_follows_the_logs(folder: RunFolder, displays: Displays) -> None:
    tail = LogTail(folder)
    tail.open()
    fold, text = displays.shown
    name = re.search(r'<details class="([^"]+)">', fold["text/html"])[1]  # type: ignore[index]
    assert f"body:has(details.{name}[open])" in text["text/html"]
    assert "nothing has been printed" in text["text/html"]
    folder.log(0, "out").write_text("".join(f"line {index}\n" for index in range(20)) + "half\rwhole <b>")
    folder.log(0, "err").write_text("warned\n")
    tail.draw(last=True)
    assert _lines(text) == [[*(f"line {index}" for index in range(13, 20)), "whole &lt;b&gt;"], ["warned"]]
    assert text["text/plain"].endswith("line 19\nwhole <b>\nwarned")
    assert displays.updates == [1]


def test_what_has_not_changed_is_not_drawn_again(folder: RunFolder, displays: Displays) -> None:
    folder.log(0, "out").write_text("x" * 5000)
    tail = LogTail(folder)
    tail.open()
    for _ in range(3):
        tail.draw(last=True)
    assert displays.updates in ([], [1])
    assert len(_lines(displays.shown[1])[0][0]) < 500
