from __future__ import annotations

import numpy as np
import pytest

from collie_lab.view.curves import curve, extremes, means, smooth, value_range


def _noisy(count: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.arange(1.0, count + 1)
    return x, np.exp(-x / count) + np.random.default_rng(0).normal(0, 0.1, count)


@pytest.mark.parametrize("gaps", [False, True])
def test_smoothing_is_local_linear_regression(gaps: bool) -> None:
    x, y = _noisy(80)
    if gaps:
        y[[0, 17, 18, 50]] = np.nan
    width = 3.0
    result = smooth(y, width)
    known = np.isfinite(y)
    for at in range(len(y)):
        near = known & (np.abs(np.arange(len(y)) - at) <= 9)
        weight = np.exp(-0.5 * ((np.arange(len(y)) - at) / width) ** 2)
        expected = np.polyval(np.polyfit(x[near], y[near], 1, w=np.sqrt(weight[near])), x[at])
        assert result[at] == pytest.approx(expected) if known[at] else np.isnan(result[at])


def test_a_straight_line_is_left_alone() -> None:
    line = np.linspace(5, 1, 50)
    np.testing.assert_allclose(smooth(line, 4.0), line)


@pytest.mark.parametrize("values", [[], [2.0], [np.nan, 2.0, np.nan], [np.nan] * 5])
def test_smoothing_of_next_to_nothing(values: list[float]) -> None:
    np.testing.assert_allclose(smooth(np.array(values), 1.0), values)


@pytest.mark.parametrize("count", [0, 1, 600, 601, 12_345])
def test_thinned_to_the_limit(count: int) -> None:
    x, y = _noisy(count)
    for thin_x, thin_y in (extremes(x, y, 600), means(x, y, 600)):
        assert len(thin_x) == len(thin_y) <= 600
        assert len(thin_x) == count or count > 600


def test_extremes_keep_spikes_and_are_measured_points() -> None:
    x, y = _noisy(5000)
    y[[1234, 4321]] = 50.0, -50.0
    y[100:200] = np.nan
    thin_x, thin_y = extremes(x, y, 600)
    assert np.nanmax(thin_y) == 50.0
    assert np.nanmin(thin_y) == -50.0
    assert (np.diff(thin_x) > 0).all()
    np.testing.assert_array_equal(thin_y, y[thin_x.astype(int) - 1])


def test_means_skip_nan() -> None:
    x, y = np.arange(8.0), np.array([1, 3, np.nan, 5, np.nan, np.nan, 7, 9.0])
    thin_x, thin_y = means(x, y, 4)
    np.testing.assert_allclose(thin_x, [0.5, 2.5, 4.5, 6.5])
    np.testing.assert_allclose(thin_y, [2, 5, np.nan, 8])


def test_a_growing_curve_keeps_what_is_drawn() -> None:
    x, y = _noisy(2000)
    early, late = extremes(x[:1400], y[:1400], 600), extremes(x, y, 600)
    shared = len(early[0]) - 2  # the last bucket was not full yet
    np.testing.assert_array_equal(early[0][:shared], late[0][:shared])


def test_few_points_are_not_smoothed() -> None:
    assert not curve(*_noisy(19)).is_smoothed
    assert curve(*_noisy(20)).is_smoothed


def test_value_range() -> None:
    assert value_range(np.array([])) == (0.0, 1.0)
    assert value_range(np.array([np.nan])) == (0.0, 1.0)
    assert value_range(np.array([1.0, np.nan]), np.array([3.0])) == (1.0, 3.0)
    low, high = value_range(np.array([2.0, 2.0]))
    assert low < 2 < high
    spiked = np.ones(1000)
    spiked[0], spiked[500] = 0.0, 1e9
    assert value_range(spiked) == (0.0, 1.0)
