"""Curves made fit for drawing: smoothed, and thinned to what a screen can show. Numbers in, numbers out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Curve", "curve", "extremes", "means", "smooth", "value_range"]

Array = NDArray[np.float64]

#: A smoothed curve is drawn from so many points on; below, it would only hide the few there are.
_SMOOTH_FROM = 20


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps: as it was measured, and smoothed (both thinned)."""

    x: Array
    raw: Array
    smooth_x: Array
    smooth: Array

    @property
    def is_smoothed(self) -> bool:
        """Whether there are enough points for the smoothed line to say something of its own."""
        return len(self.smooth) >= _SMOOTH_FROM


def curve(x: Array, y: Array, points: int = 600) -> Curve:
    """`y` over `x` with at most `points` points a line: extremes for the raw one, means for the smooth one."""
    raw_x, raw = extremes(x, y, points)
    mean_x, mean = means(x, y, points)
    return Curve(raw_x, raw, mean_x, smooth(mean, width=min(max(len(mean) / 40, 1.0), 10.0)))


def smooth(values: Array, width: float) -> Array:
    """Local linear regression under a Gaussian window of standard deviation `width`; NaN is skipped, stays NaN.

    At t it is the value at t of the line that minimises Σ_i k(i − t) (x_i − a − b (i − t))². A moving
    average lags behind a falling loss, and would show it higher than it is; this does not, even at the ends.
    """
    if not len(values):
        return values
    reach = max(1, min(int(np.ceil(3 * width)), len(values)))
    offset = np.arange(-reach, reach + 1, dtype=np.float64)
    window = np.exp(-0.5 * (offset / width) ** 2)
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)

    def moment(of: Array, power: int) -> Array:
        """Σ_i of_i k(i − t) (i − t)^power for every t."""
        return np.convolve(of, (window * offset**power)[::-1], mode="full")[reach : reach + len(of)]

    ones = known.astype(np.float64)
    s0, s1, s2 = (moment(ones, power) for power in (0, 1, 2))
    t0, t1 = (moment(filled, power) for power in (0, 1))
    determinant = s0 * s2 - s1 * s1
    with np.errstate(all="ignore"):
        line, mean = (s2 * t0 - s1 * t1) / determinant, t0 / s0
    fitted = np.where(determinant > 1e-9 * s0 * s0, line, mean)  # a point without neighbours has no slope
    return np.where(known, fitted, np.nan)


def _bucket_size(count: int, buckets: int) -> int:
    """The smallest power of two that needs no more than so many buckets.

    Buckets count from the first point, and their size only ever doubles: the drawn part of a growing
    curve stays as it is, instead of shimmering.
    """
    size = 1
    while -(-count // size) > buckets:
        size *= 2
    return size


def means(x: Array, y: Array, points: int) -> tuple[Array, Array]:
    """At most `points` points, each the mean of as many neighbours; a bucket of NaN alone stays NaN."""
    size = _bucket_size(len(y), points)
    if size == 1:
        return x, y
    starts = np.arange(0, len(y), size)
    counts = np.diff(np.append(starts, len(y)))
    known = np.isfinite(y)
    number = np.add.reduceat(known, starts, dtype=np.int64)
    total = np.add.reduceat(np.where(known, y, 0.0), starts)
    mean = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return np.add.reduceat(x, starts) / counts, mean


def extremes(x: Array, y: Array, points: int) -> tuple[Array, Array]:
    """At most `points` points: the lowest and the highest of as many neighbours, in their order.

    Unlike means and every n-th point, this keeps the spikes, and the noise looks as wide as it is.
    """
    if len(y) <= points:
        return x, y
    size = _bucket_size(len(y), points // 2)
    padded = np.full(-(-len(y) // size) * size, np.nan)
    padded[: len(y)] = y
    rows = padded.reshape(-1, size)
    low = np.argmin(np.where(np.isnan(rows), np.inf, rows), axis=1)
    high = np.argmax(np.where(np.isnan(rows), -np.inf, rows), axis=1)
    both = np.sort(np.stack([low, high], axis=1), axis=1) + size * np.arange(len(rows))[:, None]
    index = np.minimum(np.unique(both), len(y) - 1)
    return x[index], y[index]


def value_range(*parts: Array) -> tuple[float, float]:
    """Lowest and highest value worth an axis: in a long curve the top percent may leave the frame.

    (0, 1) where nothing is finite; a range that is never empty.
    """
    finite = [part[np.isfinite(part)] for part in parts]
    finite = [part for part in finite if len(part)]
    if not finite:
        return 0.0, 1.0
    low = min(float(part.min()) for part in finite)
    high = max(float(np.percentile(part, 99) if len(part) >= 200 else part.max()) for part in finite)
    if high - low < 1e-9 * max(abs(high), 1e-300):
        pad = abs(high) / 2 or 0.5
        return low - pad, high + pad
    return low, high
