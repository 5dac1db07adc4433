"""The verbs of whatever has outcomes: its tables, figures, fairness, exports and report."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collie_lab.study.outcomes import Outcomes

if TYPE_CHECKING:
    import pandas as pd

    from collie_lab.launch import Run
    from collie_lab.study.columns import Column
    from collie_lab.study.fairness import Fairness
    from collie_lab.study.table import Table
    from collie_lab.view.figures import Picture

__all__ = ["Presentation"]


class Presentation(ABC, Outcomes):
    """A base class: who gives `frame`, `axes` and `runs` gets the rest."""

    @property
    @abstractmethod
    def frame(self) -> pd.DataFrame:
        """See `Outcomes.frame`."""

    @property
    @abstractmethod
    def axes(self) -> Sequence[str]:
        """See `Outcomes.axes`."""

    @property
    @abstractmethod
    def runs(self) -> Mapping[str, Run]:
        """See `Outcomes.runs`."""

    @property
    def title(self) -> str:
        """At the head of an export and of a report."""
        return "Results"

    @property
    def folders(self) -> Mapping[str, Path]:
        """The folder of each arm that has one beside its run's, by the arm's name."""
        return {}

    @property
    def tuned(self) -> Mapping[str, str | Column]:
        """The axes that were tuned, each with the metric that chooses its value."""
        return {}

    @property
    def recipe(self) -> Mapping[str, str]:
        """Files from which all arms follow, by their names."""
        return {}

    def table(self, metrics: Sequence[Any] | None = None, **options: Any) -> Table:
        """A table of the figures that matter; see `collie_lab.study.table.tabulate`."""
        from collie_lab.study.table import tabulate

        return tabulate(self, metrics, **options)

    def figure(self, kind: str | None = None, **options: Any) -> Picture:
        """A figure: `size`, `bars`, `components`, `pareto`, `curves` or `sweep`; `options` are those of the function of
        that name in `collie_lab.study.figures`. It is shown in a notebook, and has `data`, `arms` and `save`.

        Without a kind: the loss curves of all runs, and what each reached and needed as bars.
        """
        if kind is None:
            from collie_lab.view import compare

            return compare(list(self.runs.values()), labels=list(self.runs))
        from collie_lab.study.figures import draw

        return draw(self, kind, **options)

    def fairness(self, compare: str | None = None, **options: Any) -> Fairness:
        """What else differs between arms that are compared; see `collie_lab.study.fairness.fairness`."""
        from collie_lab.study.fairness import fairness

        return fairness(self, compare, **options)

    def report(self, out: str | Path, **options: Any) -> Path:
        """One HTML page that needs nothing else; see `collie_lab.study.report.write_report`."""
        from collie_lab.study.report import write_report

        return write_report(self, out, **options)

    def _repr_html_(self) -> str:
        return self.table().to_html()
