from __future__ import annotations

import pytest

from collie_lab.view.units import bytes_text, count_text, duration_text, number_text, percent_text


@pytest.mark.parametrize(("value", "text"), [
    (None, "–"), (float("nan"), "–"), (0, "0"), (1.25, "1.250"), (12.3456, "12.35"), (5000.4, "5000"),
    (0.00123, "0.001230"), (3e-5, "3.00e-5"), (1.5e9, "1.50e9"), (-2.5, "-2.500"),
])
def test_number(value: float | None, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (None, "–"), (0, "0"), (950, "950"), (999.7, "1.00k"), (12_345, "12.3k"), (999_600, "1.00M"), (2e15, "2000T"),
])
def test_count(value: float | None, text: str) -> None:
    assert count_text(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (0, "0 B"), (1500, "1.50 kB"), (1_200_000_000, "1.20 GB"), (80e9, "80.0 GB"),
])
def test_bytes(value: float, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (None, "–"), (0.84, "0.8 s"), (9.97, "10 s"), (59.6, "1 min 00 s"), (80, "1 min 20 s"), (3599.7, "1 h 00 min"),
    (7500, "2 h 05 min"), (86_395, "1 d 00 h"), (273_600, "3 d 04 h"),
])
def test_duration(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


def test_percent() -> None:
    assert percent_text(0.4204) == "42.0%"
    assert percent_text(None) == "–"
