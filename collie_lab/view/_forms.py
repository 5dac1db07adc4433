"""Forms of whole cells: their fields, the choice of their kind, and lists of them."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import ipywidgets

from collie_lab.cells import Cell, CellError, Problem
from collie_lab.cells._source import explicit_fields
from collie_lab.view._entries import ChoiceEntry, Entry, FixedEntry, TextEntry, Widgets
from collie_lab.view._fields import Facts, facts_of

__all__ = ["CellEntry", "CellForm", "CellsEntry"]

Changed = Callable[[], None]


class CellForm:
    """The fields of one cell, made from its pydantic model."""

    def __init__(self, cls: type[Cell], cell: Cell | None, widgets: Widgets, changed: Changed):
        self.cls, self._widgets = cls, widgets
        given = explicit_fields(cell) if cell is not None else {}
        self.entries = {facts.name: _entry(facts, widgets, changed, facts.name in given,
                                           facts.default if cell is None else getattr(cell, facts.name))
                        for facts in facts_of(cls)}
        self._folded = {name: entry for name, entry in self.entries.items() if not (entry.facts.main or entry.given)}
        self._failures: list[Problem] = []

    def build(self) -> Cell:
        """The cell as it stands, without the fields that only repeat a default.

        Raises:
            CellError: all that is wrong with it, and with the cells in it.
        """
        given: dict[str, Any] = {}
        failed: set[str] = set()
        problems: list[Problem] = []  # of the cells in it
        self._failures = []
        for name, entry in self.entries.items():
            try:
                if entry.given:
                    given[name] = entry.value(self.cls.__name__)
                elif entry.facts.required:
                    raise CellError([Problem(self.cls.__name__, name, "this field is required")])
            except CellError as error:
                failed.add(name)
                (problems if entry.facts.base else self._failures).extend(error.problems)
        try:
            # A stand-in for what is required and failed, so that the rest is judged too.
            cell = self.cls(**given, **{name: "?" for name in failed if self.entries[name].facts.required})
        except CellError as error:
            self._failures += [problem for problem in error.problems if _field(problem) not in failed]
        if problems or self._failures:
            raise CellError([*self._failures, *problems])
        for name, entry in self.entries.items():
            if not entry.given:
                entry.show(getattr(cell, name))
        return self.cls(**explicit_fields(cell))

    def mark(self, report: list[Problem]) -> list[Problem]:
        """Show at each field what `build` found wrong with it, else what `check` did; the same for the cells in it.

        Returns:
            The problems of this cell as a whole.
        """
        mine = self._failures or [problem for problem in report if problem.cell == self.cls.__name__]
        for name, entry in self.entries.items():
            here = [problem for problem in mine if _field(problem) == name]
            if isinstance(entry, (CellEntry, CellsEntry)):
                entry.mark_cells(here, report)
            else:
                entry.mark(here)
            if here and name in self._folded and self._more is not None:
                self._more.value = True
        return [problem for problem in mine if _field(problem) not in self.entries]

    @cached_property
    def box(self) -> Any:
        """The fields as a grid; those at their default beyond the main ones are folded away."""
        shown = [entry.box for name, entry in self.entries.items() if name not in self._folded]
        grid = self._widgets.make(ipywidgets.VBox, "collie-grid", children=tuple(shown))
        return self._widgets.make(ipywidgets.VBox, "collie-form",
                                  children=(grid, self._more) if self._more is not None else (grid,))

    @cached_property
    def _more(self) -> Any:
        """Unfolds the rest; None where there is none."""
        if not self._folded:
            return None
        button = self._widgets.make(ipywidgets.ToggleButton, "collie-more", description=f"{len(self._folded)} more",
                                    icon="angle-right", tooltip=", ".join(self._folded))
        button.observe(self._fold, "value")
        return button

    @cached_property
    def _rest(self) -> Any:
        children = tuple(entry.box for entry in self._folded.values())
        return self._widgets.make(ipywidgets.VBox, "collie-grid", children=children)

    def _fold(self, change: Any) -> None:
        self._more.icon = "angle-down" if change["new"] else "angle-right"
        grid = self.box.children[0]
        self.box.children = (grid, self._more, self._rest) if change["new"] else (grid, self._more)


class CellEntry(Entry):
    """A cell in a slot: its kind, where there are several, and its form. What was typed into a kind is kept."""

    def __init__(self, facts: Facts, widgets: Widgets, changed: Changed, start: Cell | type[Cell] | None,
                 remove: Callable[[CellEntry], None] | None = None):
        assert facts.base is not None
        cell, cls = (start, type(start)) if isinstance(start, Cell) else (None, start)
        kinds = {cls.__name__: cls for cls in [*facts.base.kinds().values(), *([cls] if cls is not None else [])]}
        if cls is None and not facts.optional:
            cls = next(iter(kinds.values()))
        self._changed = changed
        self._forms = {cls: CellForm(cls, cell, widgets, changed)} if cls is not None else {}
        options = [*([("none", None)] if facts.optional else []), *kinds.items()]
        self.kind = widgets.make(ipywidgets.Dropdown, "collie-kind", options=options, tooltip="its kind",
                                index=[cls for _, cls in options].index(cls))
        self.kind.observe(self._choose, "value")
        header = [*([_title(facts, widgets)] if facts.name else []), *([self.kind] if len(options) > 1 else [])]
        if remove is not None:
            button = widgets.make(ipywidgets.Button, "collie-remove", icon="times", tooltip="Remove")
            button.on_click(lambda button: remove(self))
            header.append(button)
        self._about = widgets.make(ipywidgets.HTML, "collie-about")
        super().__init__(facts, widgets, widgets.make(ipywidgets.HBox, "collie-header", children=tuple(header)),
                         "collie-card")
        self.given = True
        self._fill()

    @property
    def form(self) -> CellForm | None:
        """The form of the chosen kind; None for no cell."""
        return self._forms.get(self.kind.value)

    def value(self, cell: str) -> Cell | None:
        return self.form.build() if self.form is not None else None

    def mark_cells(self, problems: list[Problem], report: list[Problem]) -> None:
        """Show problems of the slot, and those of the cell in it."""
        self.mark([*problems, *(self.form.mark(report) if self.form is not None else [])])

    def _choose(self, change: Any) -> None:
        cls = change["new"]
        if cls is not None and cls not in self._forms:
            self._forms[cls] = CellForm(cls, None, self.widgets, self._changed)
        self._fill()
        self._changed()

    def _fill(self) -> None:
        doc = inspect.cleandoc((self.kind.value or self.facts.base).__doc__ or "")
        if self.kind.value is None and self.facts.doc:
            doc = self.facts.doc
        first = html.escape(" ".join(doc.partition("\n\n")[0].split()))
        text = re.sub("`(.+?)`", r"<code>\1</code>", first)
        self._about.value = f'<div title="{html.escape(doc)}">{text}</div>'
        form = [self.form.box] if self.form is not None else []
        self.box.children = (self.control, self._about, *form, *([self._note] if self._note is not None else []))


class CellsEntry(Entry):
    """A list of cells: one button a kind adds one. Functions among them stay."""

    def __init__(self, facts: Facts, widgets: Widgets, changed: Changed, cells: tuple[Any, ...]):
        assert facts.base is not None
        self._changed = changed
        self.add: dict[str, Any] = {}
        for cls in facts.base.kinds().values():
            button = widgets.make(ipywidgets.Button, "collie-add", description=cls.__name__, icon="plus",
                                  tooltip=inspect.cleandoc(cls.__doc__ or ""))
            button.on_click(lambda button, cls=cls: self._append(cls))
            self.add[cls.__name__] = button
        header = widgets.make(ipywidgets.HBox, "collie-header", children=(_title(facts, widgets), *self.add.values()))
        super().__init__(facts, widgets, header, "collie-card")
        self.given = True
        self.items: list[Entry] = [self._item(cell) for cell in cells]
        self._list = widgets.make(ipywidgets.VBox, "collie-items", children=tuple(item.box for item in self.items))
        self.box.children = (header, self._list)

    def value(self, cell: str) -> tuple[Any, ...]:
        values: list[Any] = []
        problems: list[Problem] = []
        for item in self.items:
            try:
                values.append(item.value(cell))
            except CellError as error:
                problems += error.problems
        if problems:
            raise CellError(problems)
        return tuple(values)

    def mark_cells(self, problems: list[Problem], report: list[Problem]) -> None:
        """Show problems of the list, and those of the cells in it."""
        self.mark(problems)
        for item in self.items:
            if isinstance(item, CellEntry):
                item.mark_cells([], report)

    def _item(self, start: Any) -> Entry:
        facts = replace(self.facts, name="", optional=False)
        if not isinstance(start, (Cell, type)):
            return FixedEntry(facts, self.widgets, True, start)
        return CellEntry(facts, self.widgets, self._changed, start, remove=self._remove)

    def _append(self, cls: type[Cell]) -> None:
        self._set([*self.items, self._item(cls)])

    def _remove(self, item: Entry) -> None:
        self._set([other for other in self.items if other is not item])

    def _set(self, items: list[Entry]) -> None:
        self.items = items
        self._list.children = tuple(item.box for item in items)
        self._changed()


def _title(facts: Facts, widgets: Widgets) -> Any:
    text = f'<b title="{html.escape(facts.doc)}">{html.escape(facts.name)}</b>'
    return widgets.make(ipywidgets.HTML, "collie-title", value=text)


def _entry(facts: Facts, widgets: Widgets, changed: Changed, given: bool, value: Any) -> Entry:
    """The entry that suits a field, and the value that it begins with."""
    if facts.base is not None:
        return (CellsEntry if facts.several else CellEntry)(facts, widgets, changed, value)
    if not facts.takes(value):
        return FixedEntry(facts, widgets, given, value)
    return (ChoiceEntry if facts.choices else TextEntry)(facts, widgets, changed, given, value)


def _field(problem: Problem) -> str:
    """The field of a problem: `betas` of `betas.0`."""
    return problem.field.partition(".")[0]
