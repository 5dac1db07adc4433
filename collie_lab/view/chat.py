"""A chat with the model of a run while it trains: a field, a button, and the conversation in bubbles.

The conversation is HTML that is updated in place, and stays in the notebook as it is; only the field and the button
are widgets, and they go when the run has ended.
"""

from __future__ import annotations

import html
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from collie_lab.folder import RunFolder
from collie_lab.view.history import History
from collie_lab.view.sheet import hint_line, sheet

__all__ = ["Answering", "chat"]

#: Seconds between two drawings of a growing answer, and between two looks at whether the run goes on.
_DRAW_EVERY: Final = 0.1
_POLL: Final = 0.25

# The newest bubble stays in sight without a script: a column that runs upwards is scrolled to its first item.
_STYLE: Final = """
.collie .talk{display:flex;flex-direction:column-reverse;gap:8px;padding:2px}
.collie .talk.live{max-height:420px;overflow-y:auto}
.collie .turn{display:flex;flex-direction:column;max-width:82%;align-self:flex-start;align-items:flex-start}
.collie .turn.you{align-self:flex-end;align-items:flex-end}
.collie .say{padding:6px 12px;border-radius:14px 14px 14px 4px;background:rgba(128,128,128,.16);
 white-space:pre-wrap;overflow-wrap:anywhere}
.collie .you .say{border-radius:14px 14px 4px 14px;background:#0067A3;color:#fff}
.collie .error .say{background:rgba(179,38,30,.12);box-shadow:inset 0 0 0 1px rgba(179,38,30,.55)}
.collie .turn .when{font-size:11px;opacity:.65;margin:2px 4px 0}
""".replace("\n", "")


class Answering(Protocol):
    """What the chat needs to know of a run."""

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""

    @property
    def alive(self) -> bool:
        """Whether its processes still exist."""

    def ask(self, prompt: str, *, max_new_tokens: int = ..., temperature: float = ...,
            on_text: Callable[[str], None] | None = ...) -> str:
        """The model's answer; `on_text` is called with every new piece of it."""


@dataclass
class _Turn:
    """One bubble: what was said by whom (`you`, `model`, `error`), and at which step."""

    who: str
    text: str = ""
    step: int | None = None


@dataclass
class _Talk:
    """The conversation so far."""

    turns: list[_Turn] = field(default_factory=list)

    def markup(self, live: bool, hint: str = "") -> str:
        """The bubbles, the newest at the bottom."""
        bubbles = "".join(_bubble(turn) for turn in reversed(self.turns))
        return sheet(f'<div class="talk{" live" * live}">{bubbles}</div>' if bubbles else "", hint_line(hint),
                     style=_STYLE)

    def plain(self) -> str:
        """The same as lines of text."""
        return "\n".join(f"{turn.who}{_when(turn, ' (step {:,})')}: {turn.text}" for turn in self.turns)


def _bubble(turn: _Turn) -> str:
    when = _when(turn, '<div class="when">step {:,}</div>')
    return f'<div class="turn {turn.who}"><div class="say">{html.escape(turn.text) or "…"}</div>{when}</div>'


def _when(turn: _Turn, form: str) -> str:
    return "" if turn.step is None else form.format(turn.step)


def chat(run: Answering, *, max_new_tokens: int = 128, temperature: float = 0.0) -> None:
    """Show a chat with the model of a run that goes on; it ends with the run, and the conversation stays.

    Each prompt stands for itself: the model is not told what was said before. `max_new_tokens` and `temperature`
    (0: the likeliest token) are those of `ask`. Outside a notebook it raises a `RuntimeError`.
    """
    if "IPython" not in sys.modules or sys.modules["IPython"].get_ipython() is None:
        raise RuntimeError("chat: this is no notebook; run.ask(prompt) answers everywhere")
    panel = _Chat(run, {"max_new_tokens": max_new_tokens, "temperature": temperature})
    panel.open()
    threading.Thread(target=panel.see_to_the_end, name=f"chat with {run.folder.id}", daemon=True).start()


class _Chat:
    """The outputs of one chat and what happens in them. One answer at a time, in a thread of its own."""

    def __init__(self, run: Answering, settings: dict[str, Any]):
        self._run, self._settings = run, settings
        self._history = History(run.folder)
        self._talk = _Talk()
        self._drawn = 0.0
        self._lock = threading.Lock()
        self._display: Any = None
        self._form: Any = None
        self._form_display: Any = None

    def open(self) -> None:
        """Show the conversation, and the field below it."""
        import ipywidgets
        from IPython.display import display

        self._display = display(self._bundle(live=True), raw=True, display_id=True)
        self._field = ipywidgets.Text(placeholder="Ask the model as it is now …",
                                      layout=ipywidgets.Layout(flex="1 1 auto", width="auto"))
        self._send = ipywidgets.Button(description="Send", icon="paper-plane", button_style="primary",
                                       layout=ipywidgets.Layout(width="90px"))
        # The message that the field sends for the Enter key; a change of its value would also come when it is left.
        self._field.on_msg(self._hear)
        self._send.on_click(lambda _: self._ask())
        self._form = ipywidgets.HBox([self._field, self._send], layout=ipywidgets.Layout(max_width="760px"))
        self._form_display = display(self._form, display_id=True)

    def see_to_the_end(self) -> None:
        """Wait for the end of the run and of the last answer, and leave the conversation alone."""
        while self._run.alive or not self._falls_silent():
            time.sleep(_POLL)
        self._display.update(self._bundle(live=False), raw=True)
        # An output cannot be removed, so something useful takes the place of the form.
        words = f"{self._run.folder.id} has ended, and with it the chat"
        self._form_display.update({"text/html": sheet(hint_line(words)), "text/plain": words}, raw=True)
        for widget in (self._field, self._send, self._form):
            for part in (widget.layout, getattr(widget, "style", None), widget):
                if part is not None:
                    part.close()  # one left open would be saved with the notebook

    def _falls_silent(self) -> bool:
        """Take no more questions, unless an answer is still under way; whether it is so."""
        with self._lock:
            if self._field.disabled:
                return False
            self._field.disabled = self._send.disabled = True
            return True

    def _hear(self, _: Any, content: dict[str, Any], __: Any) -> None:
        if content.get("event") == "submit":
            self._ask()

    def _ask(self) -> None:
        prompt = self._field.value.strip()
        with self._lock:
            if not prompt or self._field.disabled:
                return
            self._field.disabled = self._send.disabled = True
        self._field.value = ""
        self._talk.turns += [_Turn("you", prompt), _Turn("model")]
        self._draw()
        threading.Thread(target=self._receive, args=(prompt, self._talk.turns[-1]), daemon=True).start()

    def _receive(self, prompt: str, turn: _Turn) -> None:
        """Let the model answer into a bubble, piece by piece."""
        def take(piece: str) -> None:
            if turn.step is None:
                turn.step = self._step()
            turn.text += piece
            if time.monotonic() - self._drawn >= _DRAW_EVERY:
                self._draw()

        try:
            turn.text = self._run.ask(prompt, on_text=take, **self._settings) or "(nothing)"
            turn.step = self._step() if turn.step is None else turn.step
        except Exception as error:  # whatever it is, it belongs into the conversation, not into a thread's last words
            if not turn.text:
                self._talk.turns.remove(turn)
            self._talk.turns.append(_Turn("error", str(error) or type(error).__name__))
        finally:
            self._draw()
            self._field.disabled = self._send.disabled = False

    def _step(self) -> int:
        self._history.update()
        return self._history.step

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._display.update(self._bundle(live=True), raw=True)

    def _bundle(self, live: bool) -> dict[str, str]:
        return {"text/html": self._talk.markup(live), "text/plain": self._talk.plain() or "(no conversation)"}
