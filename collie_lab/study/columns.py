"""The figures that tables and axes of figures show: their titles, units, digits, and which way is better."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from collie_lab.cells import Evaluation
from collie_lab.view.facts import is_share
from collie_lab.view.units import NOTHING, number_text

__all__ = ["DEFAULT_METRICS", "METRICS", "Column", "column"]

Better = Literal["min", "max"]


@dataclass(frozen=True)
class Column:
    """One figure of an arm as people read it.

    Attributes:
        key: its name in the frame, where it stands in base units.
        title: its heading, without the unit.
        better: whether less or more of it is better; None: neither.
        unit: what it is shown in.
        factor: from the base unit to that one.
        decimals: of the shown number; None: four significant digits.
        scales: larger units, each with the value in base units from which it is used, its factor and decimals.
    """

    key: str
    title: str
    better: Better | None = None
    unit: str = ""
    factor: float = 1.0
    decimals: int | None = None
    scales: tuple[tuple[float, str, float, int], ...] = ()

    @property
    def heading(self) -> str:
        """Title and unit: `Peak memory (MB)`."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def fitted(self, values: Iterable[float | None]) -> Column:
        """The column in the unit that suits the largest of these values (in base units)."""
        largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
        fitted = self
        for least, unit, factor, decimals in self.scales:
            if largest >= least:
                fitted = replace(self, unit=unit, factor=factor, decimals=decimals)
        return fitted

    def text(self, value: float | None) -> str:
        """A value in base units as it is shown, without the unit."""
        if value is None or not math.isfinite(value):
            return NOTHING
        scaled = value * self.factor
        text = number_text(scaled) if self.decimals is None else f"{scaled:,.{self.decimals}f}"
        return text if text.strip("-0.") else text.removeprefix("-")  # no zero has a sign

    def spread_text(self, mean: float, std: float) -> str:
        """Mean and deviation, to the same decimals: `1.250 ± 0.004`; the mean alone where nothing deviates."""
        text = self.text(mean)
        if not std > 0:
            return text
        if self.decimals is not None or mean == 0 or "e" in text:
            return f"{text} ± {self.text(std)}"
        return f"{text} ± {std * self.factor:.{len(text.partition('.')[2])}f}"


_BYTES: Final = ((2e9, "GB", 1e-9, 2), (1e11, "GB", 1e-9, 1), (1e13, "TB", 1e-12, 2))
_COUNTS: Final = ((1e8, "M", 1e-6, 1), (1e10, "B", 1e-9, 2))
_SECONDS: Final = ((600.0, "min", 1 / 60, 1), (36_000.0, "h", 1 / 3600, 1))

#: What is known of figures by their key; of any other, `column` makes the best of its name.
METRICS: Final[dict[str, Column]] = {each.key: each for each in (
    Column("trainable", "Trained", None, "", 1.0, 0, _COUNTS),
    Column("parameters", "Parameters", None, "", 1.0, 0, _COUNTS),
    Column("loss", "Loss", "min", decimals=3),
    Column("perplexity", "Perplexity", "min", decimals=2),
    Column("exact_match", "Exact match", "max", "%", 100.0, 1),
    Column("peak_bytes", "Peak memory", "min", "MB", 1e-6, 1, _BYTES),
    Column("planned_bytes", "Planned memory", "min", "MB", 1e-6, 1, _BYTES),
    Column("tgs", "TGS", "max", decimals=0),
    Column("mfu", "MFU", "max", "%", 100.0, 1),
    Column("tokens_per_second", "Tokens per second", "max", decimals=0),
    Column("tokens_per_step", "Tokens per step", None, decimals=0),
    Column("seconds", "Time", "min", "s", 1.0, 1, _SECONDS),
    Column("steps", "Steps", None, decimals=0),
)}

#: The columns of a table that asks for none; those that no arm has are left out.
DEFAULT_METRICS: Final = ("trainable", "loss", "perplexity", "exact_match", "peak_bytes", "tgs", "mfu")


def column(metric: str | Column) -> Column:
    """The column of a figure: as `METRICS` has it, else from what the evaluation cells say of their figures."""
    if isinstance(metric, Column):
        return metric
    if metric in METRICS:
        return METRICS[metric]
    title = metric.replace("_", " ")
    title, better = title[:1].upper() + title[1:], _direction(metric)
    return Column(metric, title, better, "%", 100.0, 1) if is_share(metric) else Column(metric, title, better)


def _direction(metric: str) -> Better | None:
    """The way of the longest figure that the name ends in: an evaluation's own name goes before it."""
    ways = _directions()
    ends = [figure for figure in ways if metric == figure or metric.endswith(f"_{figure}")]
    return ways[max(ends, key=len)] if ends else None


@functools.cache
def _directions() -> dict[str, Better]:
    return {figure: way for cell in Evaluation.kinds().values() for figure, way in (cell.better or {}).items()}
