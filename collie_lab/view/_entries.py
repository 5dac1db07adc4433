"""What a person changes one field with: a text, a choice; and what can only be looked at."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets

from collie_lab.cells import Problem
from collie_lab.view._fields import Facts, read, summary, write

__all__ = ["ChoiceEntry", "Entry", "FixedEntry", "TextEntry", "Widgets", "notes"]


class Widgets:
    """Makes the widgets of one form, and closes them all."""

    def __init__(self) -> None:
        self._layout = ipywidgets.Layout()
        self._made: list[Any] = [self._layout]
        self._styles: dict[type, Any] = {}

    def make(self, cls: type, css: str, **traits: Any) -> Any:
        """A widget with CSS classes. All share a layout, those of one class a style: CSS does the rest."""
        if cls in self._styles:
            traits["style"] = self._styles[cls]
        widget = cls(layout=self._layout, _dom_classes=tuple(css.split()), **traits)
        if hasattr(widget, "style") and cls not in self._styles:
            self._styles[cls] = widget.style
            self._made.append(widget.style)
        self._made.append(widget)
        return widget

    def close(self) -> None:
        """Close every widget, layouts and styles too: one left open would be saved with the notebook."""
        for widget in self._made:
            widget.close()


def notes(problems: list[Problem], where: Callable[[Problem], str]) -> str:
    """Problems as HTML lines, each beginning with `where` it is."""
    return "".join(
        f'<div class="{problem.level}"><code>{html.escape(where(problem))}</code> {html.escape(problem.message)}'
        + (f'<span class="remedy"> → {html.escape(problem.remedy)}</span>' if problem.remedy else "") + "</div>"
        for problem in problems)


class Entry:
    """One field in the form: its control, and below it what is wrong with it."""

    def __init__(self, facts: Facts, widgets: Widgets, control: Any, css: str = ""):
        self.facts, self.control, self.widgets = facts, control, widgets
        self.given = False
        """Whether the field goes to the cell; what is not given keeps its default."""
        self.box = widgets.make(ipywidgets.VBox, f"collie-field {css}", children=(control,))
        self._note: Any = None

    def value(self, cell: str) -> Any:
        """What is given, for a cell of that name. Raises CellError."""
        raise NotImplementedError

    def show(self, value: Any) -> None:
        """Show what the cell took where nothing was given."""

    def mark(self, problems: list[Problem]) -> None:
        """Show problems below the control; none takes them away."""
        text = notes(problems, lambda problem: problem.field or problem.cell)
        if text and self._note is None:
            self._note = self.widgets.make(ipywidgets.HTML, "collie-note")
            self.box.children = (*self.box.children, self._note)
        if self._note is not None:
            self._note.value = text
        level = min((problem.level for problem in problems), default="")  # "error" comes before "warning"
        self.box._dom_classes = (*(name for name in self.box._dom_classes if name not in ("error", "warning")),
                                 *([level] if level else []))

    @property
    def problems(self) -> str:
        """The text of what is shown below the control, as HTML."""
        return self._note.value if self._note is not None else ""


class TextEntry(Entry):
    """Numbers, texts and what is written like them. Empty: the default, which shows through."""

    def __init__(self, facts: Facts, widgets: Widgets, changed: Callable[[], None], given: bool, value: Any):
        shown = "required" if facts.required else summary(facts.default)
        control = widgets.make(ipywidgets.Text, "", description=facts.name, tooltip=facts.help, placeholder=shown,
                               value=write(value) if given else "")
        wide = facts.kinds & {str, dict} and facts.required
        super().__init__(facts, widgets, control, "wide" if wide else "")
        self.given, self._changed = given, changed
        control.observe(self._typed, "value")

    def value(self, cell: str) -> Any:
        return read(self.facts, cell, self.control.value)

    def show(self, value: Any) -> None:
        self.control.placeholder = summary(value)

    def _typed(self, change: Any) -> None:
        self.given = bool(self.control.value.strip())
        self._changed()


class ChoiceEntry(Entry):
    """A value out of a few."""

    def __init__(self, facts: Facts, widgets: Widgets, changed: Callable[[], None], given: bool, value: Any):
        if facts.choices == (False, True):
            control = widgets.make(ipywidgets.Checkbox, "", description=facts.name, tooltip=facts.help, value=value,
                                   indent=False)
        else:
            control = widgets.make(ipywidgets.Dropdown, "", description=facts.name, tooltip=facts.help,
                                   index=facts.choices.index(value),  # by value, None would be no choice
                                   options=[(str(choice), choice) for choice in facts.choices])
        super().__init__(facts, widgets, control)
        self.given, self._changed, self._showing = given, changed, False
        control.observe(self._chosen, "value")

    def value(self, cell: str) -> Any:
        return self.control.value

    def show(self, value: Any) -> None:
        self._showing = True
        if isinstance(self.control, ipywidgets.Checkbox):
            self.control.value = value
        else:
            self.control.index = self.facts.choices.index(value)
        self._showing = False

    def _chosen(self, change: Any) -> None:
        if not self._showing:
            self.given = True
            self._changed()


class FixedEntry(Entry):
    """A function or data in memory: they cannot be typed, and stay as they are."""

    def __init__(self, facts: Facts, widgets: Widgets, given: bool, value: Any):
        text = summary(value) if given else ""
        hint = "a function, given in code" if Callable in facts.kinds else "given in code"
        control = widgets.make(ipywidgets.Text, "", description=facts.name, tooltip=facts.help, value=text,
                               placeholder=hint, disabled=True)
        super().__init__(facts, widgets, control)
        self.given, self._value = given, value

    def value(self, cell: str) -> Any:
        return self._value
