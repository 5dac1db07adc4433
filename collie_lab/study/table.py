"""Tables: arms in rows, figures in columns, mean ± standard deviation over seeds, the best in bold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, get_args

from collie_lab.study import _markup
from collie_lab.study.artefacts import sidecar, write_sidecar
from collie_lab.study.columns import DEFAULT_METRICS, Column, column
from collie_lab.study.fairness import Fairness, compared_axis, fairness
from collie_lab.study.groups import Group, Value, chosen_arms, group_arms, known_axes, label_text, ordered
from collie_lab.study.outcomes import FINISHED, Outcomes, arm_frame, seedless, tuned_axes
from collie_lab.study.significance import Test, Verdict, against_best, test_words
from collie_lab.view.units import NOTHING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Cell", "Note", "Table", "tabulate"]

Labels = tuple[Any, ...]


@dataclass(frozen=True)
class Cell:
    """A figure of one group of arms as the table shows it."""

    value: Value
    text: str
    best: bool = False
    marks: str = ""


@dataclass(frozen=True)
class Note:
    """A line below the table; `mark` is the letter that points to it, empty for what holds of all."""

    mark: str
    text: str


@dataclass
class Table:
    """Rows of arms and columns of figures; a notebook shows it, and `save` writes it in every format.

    Attributes:
        outcomes: what it was made of.
        row_axes: the axes whose labels begin a row.
        column_axes: the axes whose labels stand below a figure's heading.
        rows: the labels of each row.
        columns: each a figure and the labels of its column.
        cells: by row and place of the column.
        statuses: how many arms have each, by the labels of row and column.
        row_marks: letters at a row's labels.
        notes: what has to be said.
        caption: a title.
        arms: the names of all arms in it.
        verdicts: the tests, where they were asked for, by figure.
    """

    outcomes: Outcomes
    row_axes: list[str]
    column_axes: list[str]
    rows: list[Labels]
    columns: list[tuple[Column, Labels]]
    cells: dict[tuple[Labels, int], Cell]
    statuses: Mapping[Labels, Mapping[str, int]]
    row_marks: dict[Labels, str] = field(default_factory=dict)
    column_marks: dict[Labels, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    caption: str = ""
    arms: list[str] = field(default_factory=list)
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)

    @property
    def text(self) -> pd.DataFrame:
        """The cells as one reads them: strings, without marks."""
        import pandas as pd

        body = [[self.cells[row, place].text for place in range(len(self.columns))] for row in self.rows]
        headings = [(shown.heading, *map(label_text, labels)) for shown, labels in self.columns]
        columns = pd.MultiIndex.from_tuples(headings, names=["", *self.column_axes]) if self.column_axes else \
            [heading for heading, in headings]
        return pd.DataFrame(body, index=_index(self.rows, self.row_axes), columns=columns)

    @property
    def numbers(self) -> pd.DataFrame:
        """Unrounded, in base units, a row a group of arms: its labels, and of every figure the mean, the standard
        deviation (`<key>_std`) and how many seeds it is of (`<key>_n`); `status`: how the arms ended."""
        import pandas as pd

        records: dict[Labels, dict[str, Any]] = {}
        for row in self.rows:
            for place, (shown, labels) in enumerate(self.columns):
                value = self.cells[row, place].value
                whole = (*row, *labels)
                record = records.setdefault(whole, {"status": _status_words(self.statuses.get(whole, {}))})
                record |= {shown.key: value.mean, f"{shown.key}_std": value.std, f"{shown.key}_n": value.n}
        return pd.DataFrame(list(records.values()), index=_index(list(records), [*self.row_axes, *self.column_axes]))

    @property
    def loc(self) -> Any:
        """Of the DataFrame `text`."""
        return self.text.loc

    @property
    def tests(self) -> pd.DataFrame:
        """A row a test: `metric`, `best`, `other`, `p`, `p_holm`, `n_best`, `n_other`."""
        import pandas as pd

        rows = [(key, verdict.best, verdict.other, verdict.p, verdict.adjusted, *verdict.n)
                for key, verdicts in self.verdicts.items() for verdict in verdicts]
        return pd.DataFrame(rows, columns=["metric", "best", "other", "p", "p_holm", "n_best", "n_other"])

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown, its columns aligned in plain text too; notes below it."""
        return _markup.markdown(self)

    def to_latex(self, *, siunitx: bool = False, label: str = "") -> str:
        """A booktabs table. With a caption or notes it is a `table` environment, else the `tabular` alone. One that may
        be wider than a line of `article` is scaled down where it is wider than the line it stands on (by graphicx).

        With `siunitx` (version 3 of the package), figures stand in `S` columns, aligned at the decimal marker.
        """
        return _markup.latex(self, siunitx=siunitx, label=label)

    def to_html(self) -> str:
        """A table that follows the light or dark theme of the page around it."""
        return _markup.page(self)

    def to_csv(self) -> str:
        """`numbers`, unrounded."""
        return str(self.numbers.to_csv())

    def save(self, stem: str | Path) -> list[Path]:
        """Write `<stem>.csv`, `.md`, `.tex`, `.html`, and the sidecar `.json` with the arms."""
        stem, files = Path(stem).expanduser(), []
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".csv", self.to_csv()), (".md", self.to_markdown()), (".tex", self.to_latex()),
                             (".html", self.to_html())):
            files.append(stem.with_name(stem.name + suffix))
            files[-1].write_text(text, encoding="utf-8")
        return [*files, write_sidecar(stem, sidecar(self.outcomes, self.arms))]

    def __repr__(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        return self.to_html()


def _index(labels: list[Labels], names: list[str]) -> pd.Index[Any]:
    import pandas as pd

    index: pd.Index[Any] = pd.MultiIndex.from_tuples(labels, names=names) if len(names) > 1 else \
        pd.Index([label for label, in labels], name=names[0])
    return index


def tabulate(
    outcomes: Outcomes, metrics: Sequence[str | Column] | None = None, *, rows: Sequence[str] | None = None,
    columns: Sequence[str] = (), compare: str | None = None, where: Mapping[str, Any] | None = None,
    tuned: Mapping[str, str | Column] | None = None, best: bool = True, test: Test | None = None, alpha: float = 0.05,
    fair: bool | Collection[str] = True, caption: str = "",
) -> Table:
    """The table of a study.

    Args:
        metrics: keys of the frame, or `Column`s; default: those of `DEFAULT_METRICS` that some arm has.
        rows: axes of the rows; default: all that vary and are neither in `columns`, tuned nor the seed.
        columns: axes spread beside each other below each metric.
        compare: the axis along which the best is looked for, all other labels equal; see `compared_axis`.
        where: only arms with these labels: `{"model": "llama-5m"}` or `{"model": ["llama-1m", "llama-5m"]}`.
        tuned: axes that were tuned, each with the metric that chooses its value, `{"optimizer.lr": "perplexity"}`: the
            table shows the arms at the best; default: those of the outcomes.
        best: set the best figure in bold, and all that show the same; with `test`, also all that are not
            significantly worse.
        test: `welch` (independent seeds) or `paired` (the same seeds in all); `tests` has p-values corrected after
            Holm too.
        alpha: the level of the test.
        fair: look for other differences between the compared arms, mark and print them; names of aspects: these are
            meant to differ (`intended` of `fairness`).
        caption: the table's title.

    Raises:
        ValueError: an unknown axis, metric or test; arms that differ in an axis that is named nowhere.
    """
    if test not in (None, *get_args(Test)):
        raise ValueError(f"test: no test is called {test!r}; there are: " + ", ".join(get_args(Test)))
    axes = list(outcomes.axes)
    arms = chosen_arms(arm_frame(outcomes), axes, where)
    tuned = tuned_axes(outcomes) if tuned is None else tuned
    given = known_axes(rows if rows is not None else [], axes, "rows")
    columns = known_axes(columns, axes, "columns")
    row_axes = given or _row_axes(arms, axes, [*columns, *tuned])
    compared, = known_axes([compare or compared_axis(axes, row_axes)], axes, "compare")
    shown = _metrics(arms, metrics)
    unnamed = () if row_axes else ("",)  # all axes are in columns, or tuned: one row, whose label is empty
    groups = {(*unnamed, *group.labels.values()): group
              for group in group_arms(arms, axes, [*row_axes, *columns], tuned=tuned)}
    names = [*unnamed, *row_axes]
    row_labels = ordered(labels[:len(names)] for labels in groups)
    column_labels = _sorted_columns(ordered(labels[len(names):] for labels in groups), arms, columns)
    table = Table(outcomes, names, columns, row_labels,
                  [(each, labels) for each in shown for labels in column_labels], {},
                  {labels: group.statuses for labels, group in groups.items()}, caption=caption,
                  arms=[name for group in groups.values() for name in group.names])
    for place, (each, labels) in enumerate(table.columns):
        for row in table.rows:
            table.cells[row, place] = _cell(each, groups.get((*row, *labels)))
    _notes_of_seeds(table)
    if best:
        _mark_best(table, compared, test, alpha)
    if fair is not False:
        _mark_differences(table, fairness(outcomes, compared, where=where, tuned=tuned,
                                          intended=() if fair is True else fair))
    table.notes.sort(key=lambda note: bool(note.mark))
    return table


def _row_axes(arms: pd.DataFrame, axes: Sequence[str], taken: Collection[str]) -> list[str]:
    free = [axis for axis in seedless(axes) if axis not in taken]
    return [axis for axis in free if len(ordered(arms[axis])) > 1] or free[:1]


def _sorted_columns(labels: list[Labels], arms: pd.DataFrame, axes: Sequence[str]) -> list[Labels]:
    """In the order of the grid, axis by axis: a first row without some of them must not change it."""
    places = [{label: place for place, label in enumerate(ordered(arms[axis]))} for axis in axes]
    return sorted(labels, key=lambda each: [place[label] for place, label in zip(places, each, strict=True)])


def _metrics(arms: pd.DataFrame, metrics: Sequence[str | Column] | None) -> list[Column]:
    if metrics is None:
        known = [key for key in DEFAULT_METRICS if key in arms and arms[key].notna().any()]
        shown = [column(key) for key in known or ["loss"]]  # a place for the statuses, where there is no figure yet
    else:
        shown = [column(metric) for metric in metrics]
        done = not arms.empty and arms["status"].isin(FINISHED).any()
        if unknown := [each.key for each in shown if each.key not in arms and done]:
            raise ValueError(f"metrics: no arm has {unknown[0]!r}; there are: "
                             + ", ".join(map(str, arms.columns)))
    return [each.fitted(arms[each.key].dropna() if each.key in arms else []) for each in shown]


def _cell(shown: Column, group: Group | None) -> Cell:
    value = group.value(shown.key) if group else Value({})
    if value.n == 0:
        return Cell(value, value.word or NOTHING)
    return Cell(value, shown.spread_text(value.mean, value.std))


def _status_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" if len(counts) > 1 else status for status, count in counts.items())


# --- what has to be said

def _point_to(table: Table, text: str) -> str:
    """The letter of a new note."""
    mark = ascii_lowercase[sum(bool(note.mark) for note in table.notes) % 26]
    table.notes.append(Note(mark, text))
    return mark


def _notes_of_seeds(table: Table) -> None:
    """Over how many seeds the means are, and what became of the seeds that are missing."""
    counts = ordered(cell.value.n for cell in table.cells.values() if cell.value.n)
    usual = max(counts, default=0)
    if usual > 1:
        table.notes.append(Note("", f"Mean ± standard deviation over {usual} seeds."))
    letters: dict[str, str] = {}
    for key, cell in table.cells.items():
        value = cell.value
        if value.n and (value.failed or value.n < usual):
            failed = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in value.failed.items())
            text = f"of {value.n} seed{'s' * (value.n > 1)}" + (f"; {failed}" if failed else "")
            if text not in letters:
                letters[text] = _point_to(table, text)
            table.cells[key] = replace(cell, marks=cell.marks + letters[text])


def _mark_best(table: Table, compare: str, test: Test | None, alpha: float) -> None:
    """Bold for the best of each set of cells that differ on the compared axis alone."""
    sets = [members for members in _compared_cells(table, compare) if len(members) > 1]
    for members in sets:
        values = {label: table.cells[place].value for label, place in members.items()}
        shown, _ = table.columns[next(iter(members.values()))[1]]
        means = {label: value.mean for label, value in values.items()}
        chosen = (min if shown.better == "min" else max)(means, key=means.__getitem__)
        bold = {label for label, mean in means.items() if shown.text(mean) == shown.text(means[chosen])}
        if test is not None:
            verdicts = against_best(chosen, values, test)
            table.verdicts.setdefault(shown.key, []).extend(verdicts)
            # Not corrected for many comparisons: that is the cautious side of calling a method worse, not of bold.
            bold |= {each.other for each in verdicts if each.p is not None and each.p >= alpha}
        for label in bold:
            table.cells[members[label]] = replace(table.cells[members[label]], best=True)
    if sets:
        table.notes.append(Note("", f"Bold: the best by {compare}{_test_note(table, test, alpha)}."))


def _compared_cells(table: Table, compare: str) -> Iterator[dict[Any, tuple[Labels, int]]]:
    """Cells with a figure that has a better and a worse, by their label on the compared axis: a set each for equal
    labels on all others."""
    by = [*table.row_axes, *table.column_axes]
    if compare not in by:
        return
    at = by.index(compare)
    sets: dict[tuple[str, Labels], dict[Any, tuple[Labels, int]]] = {}
    for row, place in table.cells:
        shown, labels = table.columns[place]
        whole = (*row, *labels)
        if shown.better is not None and table.cells[row, place].value.n:
            sets.setdefault((shown.key, whole[:at] + whole[at + 1:]), {})[whole[at]] = (row, place)
    yield from sets.values()


def _test_note(table: Table, test: Test | None, alpha: float) -> str:
    if test is None:
        return ""
    untested = any(each.p is None for verdicts in table.verdicts.values() for each in verdicts)
    return (f", and what is not significantly worse ({test_words(test)}, each by itself, p ≥ {alpha:g})"
            + ("; with fewer than two seeds nothing was tested" if untested else ""))


def _mark_differences(table: Table, found: Fairness) -> None:
    """A note for each difference between compared arms, and its letter at those that differ from most."""
    sides = ((table.row_axes, table.rows, table.row_marks),
             (table.column_axes, ordered(labels for _, labels in table.columns), table.column_marks))
    for difference, line in zip(found, found.lines(), strict=True):
        mark = _point_to(table, f"Not equal: {line}")
        for axes, lines, marks in sides:
            for labels in lines:
                here = dict(zip(axes, labels, strict=True))
                if found.compare in here and here[found.compare] in difference.odd and any(
                        all(here.get(axis, label) == label for axis, label in place.items())
                        for place in difference.where):
                    marks[labels] = marks.get(labels, "") + mark
