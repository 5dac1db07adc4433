"""The moments of a step, and what a deep model's are from those of shallow ones.

Within a step memory has its most in one of few moments: in the forward or the backward pass of a layer, in the loss, in
the update. Of layers that are alike, what is alive grows or shrinks by the same bytes from each to the next, and by the
same bytes with every layer that a model has more. So the most of all layers is at one of the two ends of their row, and
every moment at these ends is a straight line over the depth: three small depths tell whether it is, and give it.
The peak alone would not do: in a deep model it may be in another moment than in shallow ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from collie_lab.planning._roles import ROLES, Role

__all__ = ["Peak", "at_the_ends", "deepened"]

Peak = tuple[int, dict[Role, int]]
"""The most bytes of a moment, and what they are made of."""


def at_the_ends(peaks: dict[str, Peak], layers: int) -> dict[str, Peak]:
    """Moments by names that do not tell of the depth: `layer 79` of 80 is the last layer. Those in between go.

    A middle layer of three is both the second and the last but one.
    """
    found: dict[str, Peak] = {}
    for moment, peak in peaks.items():
        before, layer, number = moment.rpartition("layer ")
        if not layer:
            found[moment] = peak
            continue
        index = int(number)
        inner = 0 < index < layers - 1
        places = {"first": index == 0, "last": index == layers - 1, "second": inner and index == 1,
                  "last but one": inner and index == layers - 2}
        for place in (place for place, here in places.items() if here):
            found[f"{before}{place} layer"] = peak
    return found


def deepened(shallow: Sequence[dict[str, Peak]], more: int) -> dict[str, Peak] | None:
    """Every moment of a model that is deeper by `more` layers than the last; None where one is no straight line.

    `shallow` are the moments `at_the_ends` of models whose depths follow each other.
    """
    names = set.intersection(*(set(peaks) for peaks in shallow))
    if any(set(peaks) != names for peaks in shallow):
        return None
    found = {}
    for name in names:
        total = _line([peaks[name][0] for peaks in shallow], more)
        parts = {role: _line([peaks[name][1][role] for peaks in shallow], more) for role in ROLES}
        if total is None or None in parts.values():
            return None
        found[name] = total, {role: size or 0 for role, size in parts.items()}
    return found


def _line(values: list[int], more: int) -> int | None:
    steps = {after - before for before, after in itertools.pairwise(values)}
    return values[-1] + more * steps.pop() if len(steps) == 1 else None
