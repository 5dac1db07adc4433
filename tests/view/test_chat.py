from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from ipywidgets import Widget

from collie_lab.folder import RunFolder
from collie_lab.view import chat as module
from collie_lab.view.chat import chat
from tests.processes import wait_until
from tests.view.displays import Displays
from tests.view.fabricate import FakeRun, append, end, record


class Talker(FakeRun):
    """A run that answers in two pieces, the second when it is let go on."""

    def __init__(self, folder: RunFolder):
        super().__init__(folder)
        self.go_on = threading.Event()
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def ask(self, prompt: str, *, on_text: Callable[[str], None] | None = None, **settings: Any) -> str:
        self.asked.append((prompt, settings))
        if prompt == "too long":
            raise ValueError("the prompt has <5,012> tokens")
        assert on_text is not None
        on_text("a <b>")
        self.go_on.wait(10)
        on_text(" c")
        return "a <b> c"


class Chat:
    """A chat as its user sees it."""

    def __init__(self, displays: Displays):
        self.talk, self._form = displays.shown
        self.field, self.button = self._form.children

    def say(self, text: str) -> None:
        self.field.value = text
        self.field._handle_custom_msg({"event": "submit"}, [])  # as the Enter key does


@pytest.fixture
def displays(monkeypatch: pytest.MonkeyPatch) -> Displays:
    made = Displays()
    monkeypatch.setattr("IPython.display.display", made)
    monkeypatch.setattr("IPython.get_ipython", object)
    monkeypatch.setattr(module, "_POLL", 0.01)
    monkeypatch.setattr(module, "_DRAW_EVERY", 0.0)
    return made


def test_a_conversation(folder: RunFolder, displays: Displays) -> None:
    append(folder, "metrics.jsonl", [record(12)])
    before, run = set(Widget.widgets), Talker(folder)
    chat(run, max_new_tokens=7)
    talk = Chat(displays)

    talk.say("  hello <i> ")
    wait_until(lambda: "a &lt;b&gt;" in talk.talk["text/html"], 10)
    assert "hello &lt;i&gt;" in talk.talk["text/html"]
    assert (talk.field.disabled, talk.button.disabled, talk.field.value) == (True, True, "")
    talk.say("not now")
    run.go_on.set()
    wait_until(lambda: not talk.field.disabled, 10)
    assert talk.talk["text/plain"] == "you: hello <i>\nmodel (step 12): a <b> c"

    talk.field.value = "too long"
    talk.button.click()
    wait_until(lambda: len(run.asked) == 2 and not talk.field.disabled, 10)
    assert "the prompt has &lt;5,012&gt; tokens" in talk.talk["text/html"]
    talk.say("   ")
    assert run.asked == [("hello <i>", {"max_new_tokens": 7, "temperature": 0.0}),
                         ("too long", {"max_new_tokens": 7, "temperature": 0.0})]

    end(folder)
    wait_until(lambda: isinstance(displays.shown[1], dict), 10)
    wait_until(lambda: set(Widget.widgets) == before, 10)
    assert "has ended" in displays.shown[1]["text/plain"]
    assert "live" not in talk.talk["text/html"].replace(".live", "")
    assert talk.talk["text/plain"].endswith("you: too long\nerror: the prompt has <5,012> tokens")


def test_outside_a_notebook_it_says_what_to_do(folder: RunFolder) -> None:
    with pytest.raises(RuntimeError, match=r"run\.ask"):
        chat(Talker(folder))
