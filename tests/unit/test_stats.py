"""Intervals against independent references: statsmodels for the share, closed forms and coverage for the bootstrap."""

import itertools

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from sinkstudy.stats import (
    Interval,
    difference_interval,
    holm,
    mcnemar_test,
    mean_interval,
    pooled_interval,
    ratio_interval,
    sign_flip_test,
    wilson,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 7), (450, 500), (1, 1)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_agrees_with_statsmodels(hits, n, level):
    interval = wilson(hits, n, level=level)
    assert interval[1:3] == pytest.approx(proportion_confint(hits, n, 1 - level, method="wilson"), abs=1e-9)
    assert interval.value == hits / n and interval.n == n


@pytest.mark.parametrize(("hits", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(hits, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(hits, n)


@pytest.mark.parametrize("method", ["BCa", "percentile"])
def test_mean_of_many_normal_values_has_the_normal_interval(method):
    values = np.random.default_rng(1).normal(5.0, 2.0, 800)
    interval = mean_interval(values, method=method, resamples=8000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bca_follows_the_skew_that_percentile_misses():
    values = np.random.default_rng(2).exponential(1.0, 40)
    assert mean_interval(values).high > mean_interval(values, method="percentile").high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        interval = mean_interval(rng.exponential(1.0, 60), resamples=600, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_same_seed_same_interval_and_other_seed_other_interval():
    values = np.random.default_rng(4).normal(size=50)
    assert mean_interval(values, seed=7) == mean_interval(values, seed=7)
    assert mean_interval(values, seed=7) != mean_interval(values, seed=8)


def test_rows_that_repeat_an_image_add_nothing():
    values = np.random.default_rng(5).normal(size=60)
    repeated = np.repeat(values, 10)
    image = np.repeat(np.arange(60), 10)
    assert mean_interval(repeated, clusters=image) == pytest.approx(mean_interval(values), rel=1e-9)
    naive = mean_interval(repeated)
    clustered = mean_interval(repeated, clusters=image)
    assert clustered.n == 60 and naive.n == 600
    assert (clustered.high - clustered.low) > 2.5 * (naive.high - naive.low)


def test_clusters_of_unequal_size_keep_the_mean_of_rows_and_take_any_label():
    values, image = [1.0, 1.0, 1.0, 5.0, 2.0], ["b", "b", "b", "a", "c"]
    interval = mean_interval(values, clusters=image)
    assert interval.value == pytest.approx(2.0) and interval.n == 3
    assert interval.low <= interval.value <= interval.high


def test_ratio_is_of_means_and_its_interval_matches_the_delta_method():
    rng = np.random.default_rng(6)
    below = rng.gamma(20.0, 0.05, 1000)
    above = 7.0 * below + rng.normal(0.0, 1.0, 1000)
    interval = ratio_interval(above, below, resamples=6000)
    half = 1.96 * np.std(above - interval.value * below, ddof=1) / np.sqrt(1000) / below.mean()
    assert interval.value == pytest.approx(above.mean() / below.mean())
    assert interval.low == pytest.approx(interval.value - half, abs=0.12 * half)
    assert interval.high == pytest.approx(interval.value + half, abs=0.12 * half)


def test_ratio_without_spread_is_a_point_and_refuses_a_denominator_of_zero():
    below = np.array([1.0, 2.0, 3.0])
    assert ratio_interval(7 * below, below)[:3] == pytest.approx((7.0, 7.0, 7.0))
    with pytest.raises(ValueError, match="denominator"):
        ratio_interval(below, 0 * below)


def test_difference_is_paired():
    rng = np.random.default_rng(7)
    base = rng.normal(0.0, 10.0, 200)  # images differ much more than the two conditions do
    interval = difference_interval(base + 0.5 + rng.normal(0.0, 0.1, 200), base)
    assert interval.value == pytest.approx(0.5, abs=0.05)
    assert 0.4 < interval.low < interval.high < 0.6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "one number a row"),
        (lambda: mean_interval([[1.0]]), "one number a row"),
        (lambda: mean_interval([1.0, float("nan")]), "1 of 2 values"),
        (lambda: mean_interval([1.0, 2.0], clusters=[0]), "same length"),
        (lambda: ratio_interval([1.0, 2.0], [1.0]), "same length"),
        (lambda: difference_interval([1.0, 2.0], [1.0]), "same length"),
        (lambda: mean_interval([1.0, 2.0], method="guess"), "BCa"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_edge_cases_one_image_and_constant_values():
    single = mean_interval([3.0])
    assert single.value == 3.0 and np.isnan(single.low) and single.n == 1
    assert mean_interval([0.1] * 9)[:3] == pytest.approx((0.1, 0.1, 0.1))
    assert mean_interval([0.0] * 9) == Interval(0.0, 0.0, 0.0, 9)
    assert str(Interval(1.23456, 1.0, 2.0, 5)) == "1.23 [1, 2]"


def test_missing_rows_are_dropped_with_their_pairs():
    above, below = np.array([1.0, np.nan, 3.0, 5.0]), np.array([2.0, 1.0, np.nan, 4.0])
    kept = ratio_interval(above, below, clusters=[0, 1, 2, 3], missing="drop")
    assert kept == ratio_interval([1.0, 5.0], [2.0, 4.0], clusters=[0, 3])
    assert kept.value == 1.0 and kept.n == 2
    assert difference_interval(above, below, missing="drop").value == 0.0
    nothing = mean_interval([np.nan, np.nan], missing="drop")
    assert np.isnan(nothing[:3]).all() and nothing.n == 0
    with pytest.raises(ValueError, match="1 of 4 values are not finite"):
        mean_interval(above)
    with pytest.raises(ValueError, match="'raise' or 'drop'"):
        mean_interval(above, missing="skip")


def test_sign_flips_of_few_images_are_counted_out():
    first, second = np.array([3.0, 1.0, 2.5, 4.0]), np.array([1.0, 0.5, 1.0, 1.0])
    assert sign_flip_test(first, second) == 2 / 2**4  # only all plus and all minus reach the observed sum
    mixed = np.array([2.0, -1.0, 3.0, 0.5, 1.0])
    flipped = [abs(np.dot(signs, mixed)) for signs in itertools.product((1, -1), repeat=5)]
    assert sign_flip_test(mixed, 0 * mixed) == np.mean(np.array(flipped) >= abs(mixed.sum()) - 1e-12)


def test_sign_flips_of_many_images_approach_the_t_test():
    rng = np.random.default_rng(8)
    first, second = rng.normal(0.2, 1.0, 150), rng.normal(0.0, 1.0, 150)
    p = sign_flip_test(first, second)
    assert p == pytest.approx(scipy.stats.ttest_rel(first, second).pvalue, abs=0.02)
    assert sign_flip_test(first, second, seed=3) == pytest.approx(p, abs=0.02)
    assert sign_flip_test(second, first) == pytest.approx(p, abs=0.02)
    assert sign_flip_test(first + 5.0, second) == 2 / 10_000  # no random pattern reaches it; p is not 0


def test_sign_flips_keep_their_level_and_flip_images_whole():
    rng = np.random.default_rng(9)
    image = np.repeat(np.arange(25), 8)
    whole, naive = [], []
    for _ in range(150):
        difference = rng.normal(size=25)[image] + 0.2 * rng.normal(size=200)  # questions of one image go together
        whole.append(sign_flip_test(difference, 0 * difference, clusters=image, resamples=199) <= 0.05)
        naive.append(sign_flip_test(difference, 0 * difference, resamples=199) <= 0.05)
    assert np.mean(whole) <= 0.11  # 0.05 and three standard errors
    assert np.mean(naive) > 0.3
    single = sign_flip_test(np.arange(25.0), np.zeros(25))
    repeated = sign_flip_test(np.repeat(np.arange(25.0), 8), np.zeros(200), clusters=image)
    assert repeated == pytest.approx(single)


def test_sign_flips_without_anything_to_flip():
    assert sign_flip_test([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert sign_flip_test([5.0], [1.0]) == 1.0
    assert np.isnan(sign_flip_test([np.nan], [1.0], missing="drop"))
    with pytest.raises(ValueError, match="same length"):
        sign_flip_test([1.0, 2.0], [1.0])


@pytest.mark.parametrize("seed", range(5))
def test_mcnemar_agrees_with_statsmodels(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.random(80) < 0.8, rng.random(80) < 0.65
    table = [[(first & second).sum(), (first & ~second).sum()], [(~first & second).sum(), (~first & ~second).sum()]]
    assert mcnemar_test(first, second) == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue, abs=1e-12)


def test_mcnemar_closed_form_and_bad_input():
    assert mcnemar_test([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]) == pytest.approx(2 / 2**5)
    assert mcnemar_test([True, False], [True, False]) == 1.0
    with pytest.raises(ValueError, match="one truth value"):
        mcnemar_test([True], [True, False])
    with pytest.raises(ValueError, match="right or wrong"):
        mcnemar_test([0.5, 1.0], [1.0, 1.0])


@pytest.mark.parametrize("seed", range(5))
def test_holm_agrees_with_statsmodels(seed):
    p = np.random.default_rng(seed).random(12) ** 4
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-12)


def test_holm_closed_form_ties_and_tests_not_made():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.5]) == pytest.approx([1.0, 1.0])
    adjusted = holm([np.nan, 0.01, np.nan, 0.04])
    assert np.isnan(adjusted[[0, 2]]).all() and adjusted[[1, 3]] == pytest.approx([0.02, 0.04])
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([1.2])


def test_pooled_interval_of_a_mean_is_that_of_the_mean():
    values = np.random.default_rng(8).exponential(1.0, 60)
    assert pooled_interval(lambda drawn: drawn.mean(-1), values) == pytest.approx(mean_interval(values))


def test_pooled_interval_of_a_standard_deviation_covers_the_truth():
    """sd of two pooled means, 1 and 3, so 1; an image is one draw of both."""
    rng, hits = np.random.default_rng(9), 0
    for trial in range(150):
        heads = rng.normal([1.0, 3.0], 2.0, (50, 2))
        interval = pooled_interval(lambda drawn: drawn.mean(1).std(-1), heads, resamples=500, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.88 <= hits / 150 <= 0.99


def test_pooled_interval_without_images_without_spread_and_with_gaps():
    def largest(drawn):
        return drawn.mean(1).max(-1)

    assert np.isnan(pooled_interval(largest, np.zeros((0, 2)))[:3]).all()
    assert pooled_interval(largest, [[1.0, 2.0]])[0] == 2 and np.isnan(pooled_interval(largest, [[1.0, 2.0]]).low)
    assert pooled_interval(largest, np.full((5, 2), 3.0)) == (3, 3, 3, 5)
    with pytest.raises(ValueError, match="not finite"):
        pooled_interval(largest, [[1.0, np.nan]])
    with pytest.raises(ValueError, match="same images"):
        pooled_interval(lambda a, b: a.sum(1) / b.sum(1), [1.0, 2.0], [1.0])
