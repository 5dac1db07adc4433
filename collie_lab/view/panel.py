"""Runs in a notebook: outputs that are updated in place, and that end as a static picture."""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING, Any

from collie_lab.view.comparison import Comparison, comparison_page, comparison_text
from collie_lab.view.facts import closing_line
from collie_lab.view.history import History
from collie_lab.view.page import page
from collie_lab.view.tail import LogTail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from collie_lab.view.live import Watched

__all__ = ["ComparisonPanel", "Panel"]


class Panel:
    """The live panel. It needs nothing of the front-end but HTML with inline SVG; only the Stop button is a widget.

    `attended`: somebody may be looking, otherwise (papermill, nbconvert) there is neither button nor log, and
    updates are rare. `button`: whether the kernel, free while the run goes on, can hear one. `hint` is a quiet
    last line, there until the caller is interrupted.
    """

    def __init__(self, run: Watched, attended: bool, button: bool, hint: str = ""):
        self.interval = 0.2 if attended else 5.0
        self._run, self._hint = run, hint
        self._display: Any = None
        self._button = _StopButton(run) if attended and button else None
        self._log = LogTail(run.folder) if attended else None

    def open(self, history: History) -> None:
        """Show the panel, and below it the button where it can work, and the log."""
        from IPython.display import display

        self._display = display(self._live(history), raw=True, display_id=True)
        if self._button is not None:
            self._button.open()
        if self._log is not None:
            self._log.open()

    def draw(self, history: History) -> None:
        """Update the panel in place."""
        self._display.update(self._live(history), raw=True)
        if self._log is not None:
            self._log.draw()

    def interrupted(self) -> bool:
        """The panel goes on without its caller."""
        self._hint = ""
        return True

    def close(self, history: History) -> None:
        """Put the static result in the panel's place, and take the button away.

        The HTML holds its drawing; the PNG is for exports that take no HTML, and the text for the rest.
        """
        from collie_lab.view.figures import draw_history

        self._display.update(_bundle(page(history), draw_history(history), _plain(history)), raw=True)
        if self._button is not None:
            self._button.close()
        if self._log is not None:
            self._log.draw(last=True)

    def _live(self, history: History) -> dict[str, str]:
        return {"text/html": page(history, self._hint if history.alive else ""), "text/plain": _plain(history)}


class ComparisonPanel:
    """Several runs in one panel that ends as a static table and picture."""

    def __init__(self, attended: bool, hint: str = ""):
        self.interval = 0.5 if attended else 5.0
        self._hint = hint
        self._display: Any = None

    def open(self, comparison: Comparison) -> None:
        """Show the panel."""
        from IPython.display import display

        self._display = display(self._live(comparison), raw=True, display_id=True)

    def draw(self, comparison: Comparison) -> None:
        """Update the panel in place."""
        self._display.update(self._live(comparison), raw=True)

    def interrupted(self) -> bool:
        """The panel goes on without its caller."""
        self._hint = ""
        return True

    def close(self, comparison: Comparison) -> None:
        """Put the static result in the panel's place."""
        from collie_lab.view.figures import draw_comparison

        picture = draw_comparison(list(comparison.histories), list(comparison.labels))
        self._display.update(_bundle(comparison_page(comparison), picture, comparison_text(comparison)), raw=True)

    def _live(self, comparison: Comparison) -> dict[str, str]:
        return {"text/html": comparison_page(comparison, self._hint), "text/plain": comparison_text(comparison)}


class _StopButton:
    """A widget that stops the run; when that has ended, the place of the run's folder is in its place."""

    def __init__(self, run: Watched):
        self._run = run
        self._widget: Any = None
        self._display: Any = None

    def open(self) -> None:
        import ipywidgets
        from IPython.display import display

        self._widget = ipywidgets.Button(description="Stop", icon="stop", tooltip="Stop after the current step")
        self._widget.on_click(self._stop)
        self._display = display(self._widget, display_id=True)

    def close(self) -> None:
        # An output cannot be removed, so something useful takes the button's place.
        where = f"{self._run.folder.path.parent.name}/{self._run.folder.id}"
        quiet = f'<span style="opacity:.65;font-size:12px">{html.escape(where)}</span>'
        self._display.update({"text/html": quiet, "text/plain": where}, raw=True)
        for widget in (self._widget.layout, self._widget.style, self._widget):
            widget.close()  # one left open would be saved with the notebook

    def _stop(self, button: Any) -> None:
        button.disabled, button.description = True, "Stopping …"
        self._run.stop()


def _bundle(markup: str, picture: Figure, plain: str) -> dict[str, str]:
    """A static result in every form a saved notebook may be read in."""
    from collie_lab.view.figures import png

    image = base64.b64encode(png(picture, dpi=110)).decode()
    return {"text/html": markup, "image/png": image, "text/plain": plain}


def _plain(history: History) -> str:
    return f"{history.folder.id}: {closing_line(history)}"
