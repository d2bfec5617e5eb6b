"""Paired differences and Holm's correction, against scipy, the definition and simulation."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ptkit.comparison.statistics import holm, paired_difference, share_of_way
from ptkit.evaluation.statistics import bootstrap_interval
from ptkit.metrics.metric import Statistics
from ptkit.metrics.registry import metric

EXACT = metric("exact_match")
ROWS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


def column(values: object) -> Statistics:
    return np.asarray(values, dtype=np.float64)[:, None]


@given(ROWS)
@settings(max_examples=15, deadline=None)
def test_difference_holds_its_mean_and_changes_sign_with_the_sides(pairs) -> None:
    a, b = (column(side) for side in zip(*pairs, strict=True))
    there = paired_difference(EXACT, [a], [b], resamples=100, seed=0)
    back = paired_difference(EXACT, [b], [a], resamples=100, seed=0)
    assert there.interval.low <= there.interval.mean <= there.interval.high
    assert there.interval.mean == EXACT.score(a) - EXACT.score(b) == -back.interval.mean
    assert there.interval.low == pytest.approx(-back.interval.high)
    assert there.p_value == back.p_value


def test_equal_systems_do_not_differ() -> None:
    rows = column(np.arange(50) % 3 == 0)
    same = paired_difference(EXACT, [rows], [rows], resamples=200, seed=0)
    assert (same.interval.low, same.interval.mean, same.interval.high) == (0.0, 0.0, 0.0)
    assert same.p_value == 1.0


def test_interval_and_p_agree_with_the_paired_t_test_on_a_mean() -> None:
    generator = np.random.default_rng(3)
    checked = 0
    for shift in (0.0, 0.02, 0.05, 0.1):
        b = generator.random(400)
        a = b + generator.normal(shift, 0.3, 400)
        theirs = stats.ttest_rel(a, b)
        bounds = theirs.confidence_interval(0.95)
        ours = paired_difference(EXACT, [column(a)], [column(b)], resamples=2000, seed=0)
        width = 100 * (bounds.high - bounds.low)
        assert ours.interval.low == pytest.approx(100 * bounds.low, abs=0.1 * width)
        assert ours.interval.high == pytest.approx(100 * bounds.high, abs=0.1 * width)
        assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.04)
        checked += 1
    assert checked == 4


def test_equally_good_systems_are_called_different_about_as_often_as_promised() -> None:
    generator = np.random.default_rng(4)
    called = 0
    for trial in range(200):
        hard = generator.random(80)
        a, b = (column(generator.random(80) < hard) for _ in range(2))
        called += paired_difference(EXACT, [a], [b], resamples=100, seed=trial).p_value < 0.05
    assert 1 <= called <= 22  # 10 expected


def test_pairing_sees_a_difference_that_separate_intervals_hide() -> None:
    """Most rows are right or wrong for both systems; the few others all speak for one."""
    b = np.arange(200) % 2 == 0
    a = b.copy()
    a[1:21:2] = True
    sides = [bootstrap_interval(EXACT, [column(s)], resamples=500, seed=0) for s in (a, b)]
    assert sides[0].low < sides[1].high
    difference = paired_difference(EXACT, [column(a)], [column(b)], resamples=500, seed=0)
    assert difference.interval.low > 0
    assert difference.p_value < 0.01


def test_disagreeing_seeds_widen_the_difference() -> None:
    base = [column(np.arange(100) % 2 == 0)]
    steady = [column(np.arange(100) % 10 < 7)] * 3
    shaky = [column(np.arange(100) % 10 < k) for k in (4, 7, 10)]

    def width(per_seed: list[Statistics]) -> float:
        interval = paired_difference(EXACT, per_seed, base, resamples=300, seed=0).interval
        assert interval.mean == pytest.approx(20.0)
        assert (interval.n_seeds, interval.n_examples) == (1, 100)
        return interval.high - interval.low

    assert width(shaky) > 1.3 * width(steady)


@pytest.mark.parametrize("name", ["bleu", "macro_f1"])
def test_corpus_metrics_that_are_no_means_can_be_compared(name: str) -> None:
    measure = metric(name)
    gold = ["a b c d e", "c d e f g", "e f g h i", "b c d e f"] * 5
    better = [g if i % 5 else "x" for i, g in enumerate(gold)]
    worse = [g if i % 2 else "x" for i, g in enumerate(gold)]
    references = [[g] for g in gold]
    a, b = (measure.statistics(p, references) for p in (better, worse))
    difference = paired_difference(measure, [a], [b], resamples=100, seed=0)
    assert difference.interval.mean == measure(better, references) - measure(worse, references)
    assert difference.interval.low <= difference.interval.mean <= difference.interval.high


def test_sides_with_other_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same examples.*\[2, 3\]"):
        paired_difference(EXACT, [np.ones((2, 1))], [np.ones((3, 1))], resamples=100, seed=0)


@given(P_VALUES)
@settings(max_examples=60, deadline=None)
def test_holm_is_the_closed_test_of_bonferroni(p_values) -> None:
    """A hypothesis's adjusted p is the largest Bonferroni p of the families that hold it."""
    everyone = range(len(p_values))
    families = [f for size in everyone for f in combinations(everyone, size + 1)]
    for i, adjusted in enumerate(holm(p_values)):
        bonferroni = [len(f) * min(p_values[j] for j in f) for f in families if i in f]
        assert adjusted == pytest.approx(min(1.0, max(bonferroni)))


def test_holm_equals_rs_p_adjust() -> None:
    # p.adjust(c(0.04, 0.01, 0.03, 0.02), "holm")
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == []


def test_share_of_way_is_the_ratio_of_means_and_its_interval_that_of_a_regression() -> None:
    """With one seed each, against the delta method's interval of a ratio of paired means."""
    generator = np.random.default_rng(3)
    start, end = generator.normal(0, 1, 400), generator.normal(10, 1, 400)
    method = 0.8 * end + generator.normal(0, 1, 400)
    sides = [[column(side)] for side in (method, start, end)]
    found = share_of_way(EXACT, *sides, resamples=2000, seed=0)
    own, way = method.mean() - start.mean(), end.mean() - start.mean()
    assert found.mean == pytest.approx(own / way)
    parts = np.stack([(method - start) / own, -(end - start) / way])
    error = own / way * parts.sum(0).std(ddof=1) / 20
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.25 * error)
    ends = share_of_way(EXACT, sides[2], sides[1], sides[2], resamples=200, seed=0)
    assert (ends.mean, ends.low, ends.high) == (1.0, 1.0, 1.0)
    assert share_of_way(EXACT, *[sides[0]] * 3, resamples=10, seed=0) is None
