"""Line charts as inline SVG: light enough to be drawn anew several times a second, themed by CSS alone.

Colours come from the classes `raw`, `smooth`, `dot`, `grid` and `tick` of the page around them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from collie_lab.view.curves import Array

__all__ = ["Line", "line_chart", "nice_ticks", "sparkline"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 24


@dataclass(frozen=True)
class Line:
    """Points joined by a line (NaN breaks it), or each a dot."""

    x: Array
    y: Array
    css: str
    dots: bool = False


def line_chart(
    lines: Sequence[Line], x_range: tuple[float, float], y_range: tuple[float, float],
    note: str = "", width: int = 720, height: int = 210,
) -> str:
    """A chart with ticks; `note` stands in its middle, for a chart that has nothing to show yet.

    The vertical range grows to the next ticks, so that it moves seldom while a curve grows.
    """
    x_ticks = nice_ticks(*x_range, count=6, whole=True)
    y_ticks = nice_ticks(*y_range, count=4)
    bottom, top = min(y_ticks[0], y_range[0]), max(y_ticks[-1], y_range[1])
    inner_width, inner_height = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    left, right = x_range if x_range[1] > x_range[0] else (x_range[0] - 1, x_range[0] + 1)

    def place(x: Array, y: Array) -> tuple[Array, Array]:
        across = _LEFT + (x - left) / (right - left) * inner_width
        up = _TOP + inner_height - (y - bottom) / (top - bottom) * inner_height
        return across, np.clip(up, -height, 2 * height)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss over steps">']
    if not note:
        parts += _axes(x_ticks, y_ticks, (left, right), (bottom, top), (inner_width, inner_height))
    # A nested <svg> clips; a clipPath would need an id that is unique in the whole notebook.
    parts.append(f'<svg x="0" y="{_TOP - 4}" width="{width}" height="{inner_height + 8}" '
                 f'viewBox="0 {_TOP - 4} {width} {inner_height + 8}">')
    parts += [_drawn(line, *place(line.x, line.y)) for line in lines]
    parts.append("</svg>")
    if note:
        parts.append(f'<text class="note" x="{width / 2}" y="{height / 2}" text-anchor="middle">'
                     f"{html.escape(note)}</text>")
    return "".join([*parts, "</svg>"])


def _axes(
    x_ticks: list[float], y_ticks: list[float], x_range: tuple[float, float], y_range: tuple[float, float],
    inner: tuple[int, int],
) -> list[str]:
    parts = []
    digits = _decimals(y_ticks)
    for tick in y_ticks:
        y = _TOP + inner[1] - (tick - y_range[0]) / (y_range[1] - y_range[0]) * inner[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + inner[0]}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{_LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">'
                     f"{tick:,.{digits}f}</text>")
    for tick in x_ticks:
        if not x_range[0] <= tick <= x_range[1]:
            continue
        x = _LEFT + (tick - x_range[0]) / (x_range[1] - x_range[0]) * inner[0]
        # The last label would stick out: it ends where the axis does.
        anchor = "end" if x > _LEFT + inner[0] - 14 else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_TOP + inner[1] + 18}" text-anchor="{anchor}">'
                     f"{tick:,.0f}</text>")
    return parts


def _drawn(line: Line, x: Array, y: Array) -> str:
    if line.dots:
        return "".join(f'<circle class="{line.css}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>'
                       for a, b in zip(x.tolist(), y.tolist(), strict=True) if math.isfinite(b))
    return f'<path class="{line.css}" d="{_path(x, y)}"/>'


def _path(x: Array, y: Array) -> str:
    """SVG path data; a point alone becomes a stroke of no length, which round caps show as a dot."""
    parts: list[str] = []
    pen_down = False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if not math.isfinite(b):
            pen_down = False
            continue
        parts.append(f"{a:.1f} {b:.1f}" if pen_down else f"M{a:.1f} {b:.1f}h0L{a:.1f} {b:.1f}")
        pen_down = True
    return " ".join(parts)


def sparkline(y: Array, width: int = 120, height: int = 22) -> str:
    """The course of a quantity without axes: zero at the bottom, the largest value at the top."""
    finite = y[np.isfinite(y)]
    high = float(finite.max()) if len(finite) else 0.0
    if len(y) < 2 or high <= 0:
        return f'<svg class="spark" viewBox="0 0 {width} {height}"></svg>'
    x = np.linspace(1.5, width - 1.5, len(y))
    path = _path(x, height - 2 - y / high * (height - 4))
    return f'<svg class="spark" viewBox="0 0 {width} {height}"><path d="{path}"/></svg>'


def nice_ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers from the one below `low` to the one above `high`."""
    if not high > low:
        high = low + 1
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _decimals(ticks: list[float]) -> int:
    """Digits behind the point that tell the ticks apart."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    return next((digits for digits in range(8) if abs(step * 10**digits - round(step * 10**digits)) < 1e-6), 8)
