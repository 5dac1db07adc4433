"""Numbers as people read them. One place, so that panels, figures and tables say a thing the same way."""

from __future__ import annotations

import math

__all__ = ["NOTHING", "bytes_text", "count_text", "duration_text", "number_text", "percent_text"]

#: What stands where there is no value.
NOTHING = "–"


def number_text(value: float | None, digits: int = 4) -> str:
    """A number to so many significant digits, zeros kept so that a column does not jump: `1.250`, `3.0e-5`."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -3 or exponent > 5:
        mantissa, power = f"{value:.{min(digits, 3) - 1}e}".split("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def count_text(value: float | None) -> str:
    """A count as the sizes of models are told, in three digits: `950`, `12.3k`, `1.20M`, `7.00B`."""
    return _prefixed(value, ("", "k", "M", "B", "T"))


def bytes_text(value: float | None) -> str:
    """Bytes with a decimal prefix (1 GB is 10⁹ bytes, as on a GPU's data sheet) and three digits: `1.20 GB`."""
    return _prefixed(value, (" B", " kB", " MB", " GB", " TB"))


def _prefixed(value: float | None, prefixes: tuple[str, ...]) -> str:
    if value is None or not math.isfinite(value):
        return NOTHING
    for prefix in prefixes:
        if abs(value) < 999.5 or prefix == prefixes[-1]:
            break
        value /= 1000
    if prefix == prefixes[0]:
        return f"{value:.0f}{prefix}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{prefix}"


def percent_text(share: float | None) -> str:
    """A share of one as a percentage: `42.0%`."""
    return NOTHING if share is None or not math.isfinite(share) else f"{100 * share:.1f}%"


def duration_text(seconds: float | None) -> str:
    """A time span in its two largest units: `0.8 s`, `45 s`, `1 min 20 s`, `2 h 05 min`, `3 d 04 h`."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
