"""`compose`: an experiment as a form that checks itself while one types, and that gives back the code."""

from __future__ import annotations

import asyncio
import html
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import ipywidgets
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

from collie_lab.cells import CellError, Experiment, Problem
from collie_lab.cells._source import to_source
from collie_lab.view._composer_plan import PlanBar
from collie_lab.view._composer_style import COPY, CSS
from collie_lab.view._entries import Widgets, notes
from collie_lab.view._forms import CellForm
from collie_lab.view.live import attended

__all__ = ["Composer", "compose"]

#: Seconds without a change before the experiment is built anew, and further seconds before it is checked: a check
#: may read files or ask the hub, which half a name should not.
_PAUSES: Final = (0.15, 0.45)


def compose(experiment: Experiment | None = None) -> Composer:
    """The composer, beginning with an experiment or with defaults: the last line of a notebook's cell shows it.

    `composer.experiment` and `composer.code` are what it stands at. Functions and data in memory cannot be typed: those
    of the given experiment stay.
    """
    return Composer(experiment)


class Composer:
    """An experiment as a form in a notebook. While one types it shows problems at their fields, and the code."""

    def __init__(self, experiment: Experiment | None = None):
        make = Widgets()
        self._widgets = make
        self.form = CellForm(Experiment, experiment, make, self._changed)
        self._report: list[Problem] = []  # of the last check
        self._latest: Experiment | None = None
        self._settling: asyncio.Task[None] | None = None
        # Two, so that a check that waits for the hub does not hold up the next.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="check")
        self._display: Any = None
        self._status = make.make(ipywidgets.HTML, "collie-status")
        self._summary = make.make(ipywidgets.HTML, "collie-summary")
        self.language = make.make(ipywidgets.ToggleButtons, "collie-language", options=["Python", "YAML"])
        self.language.observe(lambda change: self._write_code(), "value")
        self._code = make.make(ipywidgets.HTML, "collie-code")
        self.plan = PlanBar(make, lambda: self.experiment, self._threads)
        self.widget = self._lay_out()
        """The whole form as one ipywidget."""
        self._write_code()
        self._changed()

    @property
    def experiment(self) -> Experiment:
        """The experiment as it stands.

        Raises:
            CellError: all that is wrong with its fields. `experiment.check()` looks at their conflicts.
        """
        experiment = self.form.build()
        assert isinstance(experiment, Experiment)
        return experiment

    @property
    def code(self) -> str:
        """Python source of the experiment as it stands: `Experiment.to_code`. Raises CellError."""
        return self.experiment.to_code()

    def close(self) -> None:
        """Take the form away; its code stays in its place."""
        if self._settling is not None:
            self._settling.cancel()
        self.plan.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._display is not None:
            self._display.update(self._static(), raw=True)
        self._widgets.close()

    def __repr__(self) -> str:
        try:
            return self.code
        except CellError as error:
            return f"not yet an experiment: {error}"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        # Nobody is there to type when papermill or nbconvert executes a notebook.
        view = self.widget._repr_mimebundle_() if attended() and self.widget.comm is not None else {}
        self._display = display({**self._static(), **view, "text/plain": repr(self)}, raw=True, display_id=True)

    def _static(self) -> dict[str, Any]:
        """What a saved notebook shows."""
        return {"text/html": f'<div class="collie-composer"><style>{CSS}</style>{_block(repr(self), "python")}</div>',
                "text/plain": repr(self)}

    def _lay_out(self) -> Any:
        make, entries = self._widgets.make, self.form.entries
        cards = [entry.box for entry in entries.values() if entry.facts.base is not None and not entry.facts.several]
        lists = [entry.box for entry in entries.values() if entry.facts.several]
        plain = [entry.box for entry in entries.values() if entry.facts.base is None
                 and (entry.given or entry.facts.typed)]
        head = make(ipywidgets.HBox, "collie-head", children=(
            make(ipywidgets.HTML, "collie-name", value="<b>Experiment</b>"), *plain, self._status))
        return make(ipywidgets.VBox, "collie-composer", children=(
            make(ipywidgets.HTML, "collie-style", value=f"<style>{CSS}</style>"), head,
            make(ipywidgets.VBox, "collie-cards", children=tuple(cards)), *lists, self._summary, self.plan.widget,
            make(ipywidgets.VBox, "collie-source", children=(self.language, self._code))))

    def _changed(self) -> None:
        """Something was typed: build and check when no more comes for a moment; without an event loop at once."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            if (experiment := self._refresh()) is not None:
                self._show(_check(experiment))
            return
        if self._settling is not None:
            self._settling.cancel()  # the result of its check, too, is of yesterday
        self._settling = loop.create_task(self._settle())

    async def _settle(self) -> None:
        await asyncio.sleep(_PAUSES[0])
        if (experiment := self._refresh()) is None:
            return
        await asyncio.sleep(_PAUSES[1])
        loop = asyncio.get_running_loop()
        self._show(await loop.run_in_executor(self._threads, _check, experiment))

    def _refresh(self) -> Experiment | None:
        """Show what the fields make: an experiment and its code, or problems."""
        try:
            experiment = self.experiment
        except CellError as error:
            self._report = []  # of another experiment; each form knows what kept it from being built
            self._mark(error.problems)
            self._code.add_class("stale")
            return None
        self._mark(self._report, checking=True)
        self._code.remove_class("stale")
        self._latest = experiment
        self._write_code()
        return experiment

    def _write_code(self) -> None:
        """The source of the last experiment that the fields made."""
        if self._latest is None:
            self._code.value = "The code stands here as soon as nothing is missing."
        elif self.language.value == "YAML":
            self._code.value = _block(_yaml(self._latest), "yaml")
        else:
            self._code.value = _block(self._latest.to_code(), "python")

    def _show(self, report: list[Problem]) -> None:
        self._report = report
        self._mark(report)

    def _mark(self, problems: list[Problem], checking: bool = False) -> None:
        """Show problems at their fields, all of them below, and their number above."""
        self.form.mark(self._report)
        self._summary.value = notes(problems, lambda problem: f"{problem.cell}.{problem.field}".rstrip("."))
        errors = sum(problem.level == "error" for problem in problems)
        warnings = len(problems) - errors
        words = [f"{count} {word}{'s' * (count > 1)}" for count, word in ((errors, "error"), (warnings, "warning"))
                 if count]
        level = "checking" if checking else "error" if errors else "warning" if warnings else "ok"
        text = "checking …" if checking else ", ".join(words) or "✓ no problems"
        self._status.value = f'<span class="{level}">{text}</span>'


def _check(experiment: Experiment) -> list[Problem]:
    """The problems that `check` finds; where it fails itself, that."""
    try:
        return experiment.check().problems
    except Exception as error:  # whatever a file or the hub comes up with, the form goes on
        return [Problem("Experiment", "", f"the check failed: {error!r}")]


def _yaml(experiment: Experiment) -> str:
    _, held = to_source(experiment)
    if held:
        return "# YAML cannot hold what is in memory alone: " + ", ".join(held)
    return experiment.to_yaml()


def _block(text: str, language: str) -> str:
    """Source as HTML in colours, with a button that copies it."""
    colored = highlight(text, get_lexer_by_name(language), HtmlFormatter(nowrap=True, classprefix="hl-"))
    button = f'<button title="Copy the code" onclick="{html.escape(COPY)}">Copy</button>'
    return f'<div class="collie-block">{button}<pre>{colored}</pre></div>'
