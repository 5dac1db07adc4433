"""The sheet of a study's figure: panels side by side, one legend, and what the figure knows of itself."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from collie_lab.study._drawing import Looks
from collie_lab.study.artefacts import save_figure, sidecar, write_sidecar
from collie_lab.study.columns import Column
from collie_lab.study.groups import label_text, ordered
from collie_lab.study.outcomes import Outcomes
from collie_lab.study.series import Panel, Point
from collie_lab.view.figures import Picture
from collie_lab.view.style import INK, MUTED, style

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Canvas", "StudyFigure", "fitted", "mark"]

#: Inches.
_WIDTH, _HEIGHT = 7.4, 3.2


class StudyFigure(Picture):
    """A matplotlib figure that knows its data and its arms.

    Attributes:
        data: what is drawn, a row a point, unrounded, in base units.
        arms: their names.
    """

    outcomes: Outcomes
    data: pd.DataFrame
    arms: list[str]

    def save(self, stem: str | Path) -> list[Path]:
        """Write `<stem>.pdf`, `.svg`, `.png`, the data as `.csv`, and the sidecar `.json` with the arms."""
        stem = Path(stem).expanduser()
        files = save_figure(self, stem)
        data = stem.with_name(f"{stem.name}.csv")
        self.data.to_csv(data, index=False)
        return [*files, data, write_sidecar(stem, sidecar(self.outcomes, self.arms))]


class Canvas:
    """A figure in the making: `draw` on its `axes`, one for each panel, inside `style()`; then `finish`."""

    def __init__(self, outcomes: Outcomes, panels: Sequence[Panel], spread: str | None, title: str):
        self.panels = panels
        self.looks = Looks(ordered(line.label for panel in panels for line in panel.lines))
        columns = 2 if len(panels) == 4 else min(len(panels), 3)
        rows = -(-len(panels) // columns)
        self.figure = StudyFigure(figsize=(_WIDTH, _HEIGHT * (1 if rows == 1 else 0.85 * rows)), layout="constrained")
        self.figure.outcomes = outcomes
        grid = self.figure.subplots(rows, columns, squeeze=False, sharey=True)
        self.axes: list[Axes] = [axes for row in grid for axes in row][:len(panels)]
        for unused in [axes for row in grid for axes in row][len(panels):]:
            unused.remove()
        for axes, panel in zip(self.axes, panels, strict=True):
            if spread is not None:
                axes.set_title(f"{spread.rpartition('.')[2].replace('_', ' ')} {label_text(panel.label)}")
        self._columns = columns
        if title:
            self.figure.suptitle(title, x=0.012, ha="left", weight="bold", size=10, color=INK)

    @property
    def points(self) -> list[Point]:
        """Of all panels."""
        return [point for panel in self.panels for line in panel.lines for point in line.points]

    def finish(
        self, y_label: str, legend: Iterable[Artist], data: pd.DataFrame, arms: Iterable[str] | None = None,
        note: str = "",
    ) -> StudyFigure:
        """Labels, the legend (at the right of one panel, below several), a note below all, and what the figure tells
        of itself."""
        for place, axes in enumerate(self.axes):
            if place % self._columns == 0:
                axes.set_ylabel(y_label)
        legend, note = list(legend), textwrap.fill(note, 120)
        beside = len(self.axes) == 1
        if len(legend) > 1:
            drawn = self.figure.legend(handles=legend, loc="outside right upper" if beside else "outside lower center",
                                       ncols=1 if beside else min(len(legend), 5), borderaxespad=0.3)
        if note and len(legend) > 1 and not beside:
            drawn.set_title(note)  # a text of the figure would lie upon the legend
            drawn.get_title().set(size=7, color=MUTED)
        elif note:
            self.figure.supxlabel(note, x=0.012, ha="left", size=7, color=MUTED)
        self.figure.data = data
        self.figure.arms = ordered(name for point in self.points for name in point.group.names) if arms is None else \
            ordered(arms)
        return self.figure


def mark(label: str, **looks: Any) -> Line2D:
    """What the legend shows of something that is no label of an axis."""
    with style():
        return Line2D([], [], label=label, **looks)


def fitted(shown: Column, panels: Sequence[Panel]) -> Column:
    """A column in the unit that suits the points of a figure."""
    return shown.fitted(point.value.mean for panel in panels for line in panel.lines for point in line.points)
