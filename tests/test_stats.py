from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.stats import Histogram, Summary, median, percentile

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(NUMBERS)
def test_median_is_the_statisticians(values):
    assert median(values) == pytest.approx(statistics.median(values))


@given(NUMBERS, st.floats(0, 1))
def test_percentile_lies_within_and_rises(values, share):
    assert min(values) <= percentile(values, share) <= max(values)
    assert percentile(values, share) <= percentile(values, 1) == max(values)
    assert percentile(values, 0) == min(values)


def test_percentile_interpolates():
    assert percentile([40, 10, 30, 20], 0.5) == 25
    assert percentile([10, 20], 0.9) == pytest.approx(19)


def test_nothing_to_summarise_is_an_error():
    for call in (lambda: percentile([], 0.5), lambda: Summary.of([]), lambda: percentile([1], 1.5)):
        with pytest.raises(ValueError):
            call()


def test_summary():
    summary = Summary.of(range(101))
    assert (summary.count, summary.mean, summary.minimum, summary.maximum) == (101, 50, 0, 100)
    assert (summary.p50, summary.p90, summary.p99) == (50, 90, 99)


@given(st.lists(st.floats(0, 20), max_size=50))
def test_histogram_counts_every_value_once(values):
    histogram = Histogram([1, 2, 5, 10])
    for value in values:
        histogram.add(value)
    assert sum(histogram.counts) == histogram.count == len(values)
    assert histogram.counts[0] == sum(value <= 1 for value in values)
    assert histogram.counts[-1] == sum(value > 10 for value in values)


def test_histogram_quantile_is_the_bound_of_its_bucket():
    histogram = Histogram([1, 2, 5])
    assert math.isnan(histogram.mean) and math.isnan(histogram.quantile(0.5))
    for value in (0.5, 1.5, 3, 100):
        histogram.add(value)
    assert [histogram.quantile(share) for share in (0, 0.25, 0.5, 0.75, 1)] == [1, 1, 2, 5, math.inf]
    assert histogram.mean == pytest.approx(26.25)


def test_bounds_must_rise():
    for bounds in ([], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="rise"):
            Histogram(bounds)
