"""Paired differences and Holm's correction, against scipy, the definition and simulation."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ptkit.comparison import figures
from ptkit.comparison.statistics import holm, in_family, paired_difference, share_of_way
from ptkit.evaluation.statistics import Resampled, bootstrap_interval, mean_interval, resample
from ptkit.metrics.metric import Metric, Statistics
from ptkit.metrics.registry import metric

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from simulate_intervals import Accuracy, Bleu, Side, bleu, simulate

EXACT = metric("exact_match")
ROWS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


def column(values: object) -> Statistics:
    return np.asarray(values, dtype=np.float64)[:, None]


def scored(*per_seed: Statistics, resamples: int, seed: int = 0, by: Metric = EXACT) -> Resampled:
    return resample(by, per_seed, resamples=resamples, seed=seed)


@given(ROWS)
@settings(max_examples=15, deadline=None)
def test_difference_holds_its_mean_and_changes_sign_with_the_sides(pairs) -> None:
    a, b = (column(side) for side in zip(*pairs, strict=True))
    there = paired_difference(scored(a, resamples=100), scored(b, resamples=100))
    back = paired_difference(scored(b, resamples=100), scored(a, resamples=100))
    assert there.interval.low <= there.interval.mean <= there.interval.high
    assert there.interval.mean == EXACT.score(a) - EXACT.score(b) == -back.interval.mean
    assert there.interval.low == pytest.approx(-back.interval.high)
    assert there.p_value == back.p_value


def test_equal_systems_do_not_differ() -> None:
    rows = column(np.arange(50) % 3 == 0)
    same = paired_difference(scored(rows, resamples=200), scored(rows, resamples=200))
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
        ours = paired_difference(
            scored(column(a), resamples=2000), scored(column(b), resamples=2000)
        )
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
        found = paired_difference(*(scored(s, resamples=100, seed=trial) for s in (a, b)))
        called += found.p_value < 0.05
    assert 1 <= called <= 22  # 10 expected


def test_pairing_sees_a_difference_that_separate_intervals_hide() -> None:
    """Most rows are right or wrong for both systems; the few others all speak for one."""
    b = np.arange(200) % 2 == 0
    a = b.copy()
    a[1:21:2] = True
    sides = [bootstrap_interval(EXACT, [column(s)], resamples=500, seed=0) for s in (a, b)]
    assert sides[0].low < sides[1].high
    difference = paired_difference(
        scored(column(a), resamples=500), scored(column(b), resamples=500)
    )
    assert difference.interval.low > 0
    assert difference.p_value < 0.01


def test_disagreeing_seeds_widen_the_difference() -> None:
    base = [column(np.arange(100) % 2 == 0)]
    steady = [column(np.arange(100) % 10 < 7)] * 3
    shaky = [column(np.arange(100) % 10 < k) for k in (4, 7, 10)]

    def width(per_seed: list[Statistics]) -> float:
        sides = (scored(*rows, resamples=300) for rows in (per_seed, base))
        interval = paired_difference(*sides).interval
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
    difference = paired_difference(*(scored(s, resamples=100, by=measure) for s in (a, b)))
    assert difference.interval.mean == measure(better, references) - measure(worse, references)
    assert difference.interval.low <= difference.interval.mean <= difference.interval.high


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_row_says_nothing_of_other_rows(seeds: int) -> None:
    start, middle, end = (
        scored(*[column([value + seed / 9]) for seed in range(seeds)], resamples=50)
        for value in (0.0, 0.25, 1.0)
    )
    difference = paired_difference(end, start)
    for found in (mean_interval(end), difference.interval):
        assert (found.low, found.high) == (None, None)
    assert figures.score(mean_interval(middle)) == f"{middle.mean:.1f}"
    assert difference.p_value == 1.0
    assert figures.difference(difference) == "+100.0"
    assert figures.way(share_of_way(middle, start, end)) == "25%"
    assert mean_interval(scored(column([1.0, 0.0]), resamples=50)).low is not None


def test_sides_with_other_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same examples.*\[2, 3\]"):
        paired_difference(
            scored(np.ones((2, 1)), resamples=100), scored(np.ones((3, 1)), resamples=100)
        )


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
    sides = [scored(column(side), resamples=2000) for side in (method, start, end)]
    found = share_of_way(*sides)
    own, way = method.mean() - start.mean(), end.mean() - start.mean()
    assert found.mean == pytest.approx(own / way)
    parts = np.stack([(method - start) / own, -(end - start) / way])
    error = own / way * parts.sum(0).std(ddof=1) / 20
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.25 * error)
    ends = share_of_way(sides[2], sides[1], sides[2])
    assert (ends.mean, ends.low, ends.high) == pytest.approx((1.0, 1.0, 1.0))
    assert share_of_way(*[sides[0]] * 3) is None


def test_a_way_that_may_be_none_bounds_no_share() -> None:
    """Start and end differ by chance; so any share, of either sign, is possible (Fieller 1954)."""
    values = np.tile([1.0, -1.0], 25)
    start, method, end = (
        scored(column(own), resamples=200) for own in (values, 0.3 * values, 0.01 - values)
    )
    found = share_of_way(method, start, end)
    assert (found.low, found.high) == (-np.inf, np.inf)
    assert "unbounded" in figures.way(found)


@given(st.lists(st.integers(0, 20), min_size=2, max_size=6).filter(lambda v: len({*v}) > 1))
@settings(max_examples=30, deadline=None)
def test_scores_that_only_seeds_change_have_students_interval(values: list[int]) -> None:
    found = mean_interval(scored(*(np.full((9, 1), float(v)) for v in values), resamples=50))
    points = 100 * np.array(values)
    low, high = stats.t.interval(0.95, len(values) - 1, points.mean(), stats.sem(points))
    assert found.mean == pytest.approx(points.mean())
    assert (found.low, found.high) == pytest.approx((low, high))


def test_a_difference_that_only_seeds_make_has_welchs_p() -> None:
    generator = np.random.default_rng(8)
    for shift in (0.0, 1.0, 3.0):
        a, b = generator.normal(shift, 1, 5), generator.normal(0, 1, 5)
        sides = (scored(*(np.full((9, 1), v) for v in own), resamples=999) for own in (a, b))
        found = paired_difference(*sides)
        welch = stats.ttest_ind(a, b, equal_var=False)
        freedom = int(welch.df)  # rounded down
        assert found.p_value == pytest.approx(
            2 * stats.t.sf(abs(welch.statistic), freedom), abs=2e-3
        )
        half = stats.t.ppf(0.975, freedom) * np.sqrt(a.var(ddof=1) / 5 + b.var(ddof=1) / 5)
        assert found.interval.high - found.interval.mean == pytest.approx(100 * half)


def test_no_p_is_below_what_the_resamples_can_tell() -> None:
    better, worse = np.ones((40, 1)), np.zeros((40, 1))
    one = paired_difference(scored(better, resamples=199), scored(worse, resamples=199))
    assert one.p_value == 1 / 200
    # Seeds that never differ in these rows may differ in others, so no more is known.
    several = paired_difference(scored(*[better] * 3, resamples=199), scored(worse, resamples=199))
    assert several.p_value == 1 / 200


def test_methods_are_compared_on_the_same_draws_of_rows() -> None:
    values = np.arange(30.0)
    a, b = (scored(column(own), resamples=50) for own in (values, values + 1))
    assert b.replicates - a.replicates == pytest.approx(100.0)


def test_differences_of_one_family_are_corrected_together() -> None:
    generator = np.random.default_rng(6)
    base = scored(column(generator.random(200) < 0.5), resamples=500)
    found = [
        paired_difference(scored(column(generator.random(200) < share), resamples=500), base)
        for share in (0.5, 0.6, 0.65)
    ]
    assert [d.corrected for d in found] == [d.p_value for d in found]
    together = in_family(found)
    assert [d.corrected for d in together] == holm([d.p_value for d in found])
    assert [d.p_value for d in together] == [d.p_value for d in found]
    assert f"p = {together[0].corrected:.3f}" in figures.difference(together[0])


CALIBRATED = [
    (Accuracy, Side(3, 0.4), Side(3, 0.4)),
    (Accuracy, Side(5, 0.4), Side(5, 0.08)),
    (Bleu, Side(3, 0.4), Side(3, 0.4)),
    (Bleu, Side(5, 0.4), Side(5, 0.4)),
]


@pytest.mark.parametrize(("world", "first", "second"), CALIBRATED)
def test_intervals_over_few_seeds_hold_the_truth_as_often_as_they_say(
    world: type[Accuracy], first: Side, second: Side
) -> None:
    """Scores, differences and false alarms; what earlier versions did holds it less often."""
    rates = simulate(world(200, np.random.default_rng(1)), first, second, 500)
    assert 0.93 <= rates.score <= 0.97
    assert 0.93 <= rates.difference <= 0.99  # with equal spreads Welch errs on the safe side
    assert rates.alarms <= 0.06
    assert rates.score_before < rates.score - 0.02
    assert rates.difference_before < rates.difference - 0.02


def test_the_simulated_bleu_is_the_metrics() -> None:
    world = Bleu(100, np.random.default_rng(1))
    (counts,) = world._counts(np.zeros((1, 100)))
    assert bleu(counts.sum(0)) == pytest.approx(metric("bleu").score(counts))
