"""Which differences are more than the spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from collie_lab.study.groups import Value

__all__ = ["Test", "Verdict", "against_best", "test_words"]

Test = Literal["welch", "paired"]


@dataclass(frozen=True)
class Verdict:
    """The best of several groups against another of them.

    Attributes:
        p: two-sided; None where there are too few seeds to tell.
        adjusted: after Holm's correction for as many comparisons (Holm 1979); None likewise.
        n: seeds that counted, of the best and of the other.
    """

    best: Any
    other: Any
    p: float | None
    adjusted: float | None
    n: tuple[int, int]


def test_words(test: Test) -> str:
    """The test as a note names it."""
    return {"welch": "Welch's t-test", "paired": "paired t-test over seeds"}[test]


def against_best(best: Any, values: Mapping[Any, Value], test: Test) -> list[Verdict]:
    """The best group against each other one that has figures.

    `welch`: two independent samples of unequal variance (Welch 1947). `paired`: the differences at equal seeds.

    Raises:
        ImportError: scipy is not installed.
    """
    raw: dict[Any, tuple[float | None, tuple[int, int]]] = {}
    for label, value in values.items():
        if label != best and value.n:
            raw[label] = _p_value(values[best].samples, value.samples, test)
    adjusted = _holm({label: p for label, (p, _) in raw.items() if p is not None})
    return [Verdict(best, label, p, adjusted.get(label), n) for label, (p, n) in raw.items()]


def _p_value(
    one: Mapping[Any, float], two: Mapping[Any, float], test: Test,
) -> tuple[float | None, tuple[int, int]]:
    try:
        from scipy import stats
    except ImportError:
        raise ImportError(f"a {test_words(test)} needs scipy: pip install scipy, or leave `test` out") from None
    if test == "paired":
        seeds = [seed for seed in one if seed in two]
        first, second = [one[seed] for seed in seeds], [two[seed] for seed in seeds]
        constant = len({a - b for a, b in zip(first, second, strict=True)}) == 1
    else:
        first, second = list(one.values()), list(two.values())
        constant = len(set(first)) == len(set(second)) == 1
    counts = (len(first), len(second))
    if min(counts) < 2:
        return None, counts
    if constant:  # no spread at all: the t statistic is 0/0 or infinite
        return (1.0 if first[0] == second[0] else 0.0), counts
    if test == "paired":
        return float(stats.ttest_rel(first, second).pvalue), counts
    moments = [moment for each in (first, second) for moment in (fmean(each), stdev(each), len(each))]
    return float(stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue), counts


def _holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """The k-th smallest of m p-values times m − k + 1, made monotone, at most 1."""
    adjusted, reached = {}, 0.0
    for place, label in enumerate(sorted(p_values, key=lambda label: p_values[label])):
        reached = max(reached, min(1.0, (len(p_values) - place) * p_values[label]))
        adjusted[label] = reached
    return adjusted
