"""A run in a notebook: one output that is updated in place, and that ends as a static picture."""

from __future__ import annotations

import html
from typing import Any

from collie_lab.view.facts import closing_line
from collie_lab.view.history import History
from collie_lab.view.live import Watched
from collie_lab.view.page import page

__all__ = ["Panel"]


class Panel:
    """The live panel. It needs nothing of the front-end but HTML with inline SVG; only the Stop button is a widget.

    `attended`: somebody may be looking, otherwise (papermill, nbconvert) there is no button, and updates
    are rare. `blocking`: the kernel is busy with waiting for this run.
    """

    def __init__(self, run: Watched, attended: bool, blocking: bool):
        self.interval = 0.2 if attended else 5.0
        self._run = run
        self._display: Any = None
        # A kernel that waits hears no button; it hears an interrupt. (Subshells would carry the click, but
        # ipykernel sends it back to the shell that made the button: the busy one.)
        self._has_button = attended and not blocking
        self._hint = "Interrupting the cell (■) stops the run after its current step." if attended and blocking else ""
        self._button: Any = None
        self._button_display: Any = None

    def open(self, history: History) -> None:
        """Show the panel, and below it the button where it can work."""
        from IPython.display import display

        self._display = display(self._live(history), raw=True, display_id=True)
        if self._has_button:
            import ipywidgets

            self._button = ipywidgets.Button(description="Stop", icon="stop", tooltip="Stop after the current step")
            self._button.on_click(self._stop)
            self._button_display = display(self._button, display_id=True)

    def draw(self, history: History) -> None:
        """Update the panel in place."""
        self._display.update(self._live(history), raw=True)

    def close(self, history: History) -> None:
        """Put the static result in the panel's place, and take the button away.

        The HTML holds its drawing; the PNG is for exports that take no HTML, and the text for the rest.
        """
        self._display.update(page_bundle(history), raw=True)
        if self._button is not None:
            # An output cannot be removed, so something useful takes the button's place.
            where = f"{history.folder.path.parent.name}/{history.folder.id}"
            quiet = f'<span style="opacity:.65;font-size:12px">{html.escape(where)}</span>'
            self._button_display.update({"text/html": quiet, "text/plain": where}, raw=True)
            for widget in (self._button.layout, self._button.style, self._button):
                widget.close()  # one left open would be saved with the notebook

    def _live(self, history: History) -> dict[str, str]:
        return {"text/html": page(history, self._hint if history.alive else ""), "text/plain": _plain(history)}

    def _stop(self, button: Any) -> None:
        button.disabled, button.description = True, "Stopping …"
        self._run.stop()


def page_bundle(history: History) -> dict[str, Any]:
    """The static result in every form a saved notebook may be read in."""
    import base64

    from collie_lab.view.figures import draw_history, png

    image = base64.b64encode(png(draw_history(history), dpi=110)).decode()
    return {"text/html": page(history), "image/png": image, "text/plain": _plain(history)}


def _plain(history: History) -> str:
    return f"{history.folder.id}: {closing_line(history)}"

