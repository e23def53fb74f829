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
    images_needed,
    mcnemar_test,
    mean_interval,
    pooled_interval,
    ratio_interval,
    ratio_of_ratios_interval,
    rule_of_three,
    seeds_interval,
    sign_flip_test,
    wilson,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 7), (450, 500), (1, 1)])
def test_wilson_agrees_with_statsmodels(hits, n):
    interval = wilson(hits, n)
    assert interval[1:3] == pytest.approx(proportion_confint(hits, n, 0.05, method="wilson"), abs=1e-9)
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
    interval = ratio_interval(above, below)
    half = 1.96 * np.std(above - interval.value * below, ddof=1) / np.sqrt(1000) / below.mean() / interval.value
    assert interval.value == pytest.approx(above.mean() / below.mean())
    assert np.log(interval[:3]) == pytest.approx(np.log(interval.value) + half * np.array([0, -1, 1]), abs=0.01 * half)


def test_interval_of_a_ratio_is_students_of_the_jackknifes_logarithms():
    above, below = np.array([3.0, 1.0, 8.0, 2.0]), np.array([1.0, 2.0, 2.0, 5.0])
    left_out = [np.log(np.delete(above, i).mean() / np.delete(below, i).mean()) for i in range(4)]
    error = np.sqrt(3 / 4 * np.sum((left_out - np.mean(left_out)) ** 2))  # Efron & Tibshirani, equation 11.5
    low, high = scipy.stats.t.interval(0.95, 3, np.log(14 / 10), error)
    assert ratio_interval(above, below) == pytest.approx((1.4, np.exp(low), np.exp(high), 4))
    rows = ratio_interval(np.repeat(above, 2), np.repeat(below, 2), clusters=np.repeat(range(4), 2))
    assert rows == pytest.approx(ratio_interval(above, below))


def test_intervals_of_ratios_are_each_others_inverse():
    above, below, other, another = np.random.default_rng(5).gamma(1.0, 1.0, (4, 20))
    there, back = ratio_interval(above, below), ratio_interval(below, above)
    assert (1 / back.value, 1 / back.high, 1 / back.low) == pytest.approx(there[:3])
    whole = ratio_of_ratios_interval(above, below, other, another)
    back = ratio_of_ratios_interval(other, another, above, below)
    assert whole.value == pytest.approx(above.mean() / below.mean() * another.mean() / other.mean())
    assert (1 / back.value, 1 / back.high, 1 / back.low) == pytest.approx(whole[:3])
    one = np.ones(20)
    assert ratio_of_ratios_interval(above, below, one, one) == pytest.approx(there)
    assert ratio_of_ratios_interval(above, one, below, one) == pytest.approx(there)


def ratio(above, below, other=np.ones((1, 1)), another=np.ones((1, 1))):
    return above.sum(1) / below.sum(1) / (other.sum(1) / another.sum(1))


@pytest.mark.parametrize(("columns", "correlation"), [(2, 0.5), (4, 0.3), (4, 0.7)])
def test_interval_of_a_skewed_ratio_of_few_images_covers_it_where_a_bootstrap_does_not(columns, correlation):
    """Log-normal values, 28 images, all means alike: both ratios are 1."""
    rng, trials = np.random.default_rng(28), 300
    spread = np.linalg.cholesky(np.full((columns, columns), correlation) + (1 - correlation) * np.eye(columns))
    of = ratio_interval if columns == 2 else ratio_of_ratios_interval
    covered, by_bootstrap = 0, 0
    for trial in range(trials):
        values = np.exp(1.5 * spread @ rng.standard_normal((columns, 28)))
        interval, drawn = of(*values), pooled_interval(ratio, *values, resamples=500, seed=trial)
        covered += interval.low <= 1 <= interval.high
        by_bootstrap += drawn.low <= 1 <= drawn.high
    assert covered / trials >= 0.9 and covered - by_bootstrap >= 0.04 * trials


def test_ratio_without_logarithm_has_the_interval_of_the_ratio_itself():
    below = np.array([1.0, 1.0, 1.0, 1.0])
    for above in ([0.0, 0.0, 0.0, 4.0], [-3.0, 1.0, 2.0, 8.0], [-5.0, 1.0, 1.0, 1.0]):
        low, high = scipy.stats.t.interval(0.95, 3, np.mean(above), scipy.stats.sem(above))  # a mean, as below is 1
        assert ratio_interval(above, below) == pytest.approx((np.mean(above), low, high, 4))


def test_ratio_without_spread_is_a_point_and_refuses_a_denominator_of_zero():
    below = np.array([1.0, 2.0, 3.0])
    assert ratio_interval(7 * below, below)[:3] == pytest.approx((7.0, 7.0, 7.0))
    assert ratio_interval(0 * below, below)[:3] == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="denominator"):
        ratio_interval(below, 0 * below)
    with pytest.raises(ValueError, match="denominator"):
        ratio_of_ratios_interval(below, below, 0 * below, below)


def test_ratio_of_one_image_or_whose_denominator_one_image_has_is_not_known_surely():
    for above, below in (([3.0], [2.0]), ([1.0, 2.0, 3.0], [0.0, 4.0, 0.0])):
        interval = ratio_interval(above, below)
        assert interval.value == 1.5 and np.isnan(interval[1:3]).all() and interval.n == len(above)
    assert np.isnan(ratio_of_ratios_interval([], [], [], []).value)


def test_mean_of_parts_is_their_share_of_the_whole():
    parts, wholes, images = [2.0, 0.0, 6.0, 1.0], [4.0, 1.0, 6.0, 4.0], [0, 0, 1, 2]
    found = mean_interval(parts, over=wholes, clusters=images)
    assert found.value == 9 / 15 and found.n == 3 and 0.25 <= found.low < found.high <= 1
    assert mean_interval(parts, over=np.ones(4)) == mean_interval(parts)
    with pytest.raises(ValueError, match="over"):
        mean_interval(parts, over=np.zeros(4))


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
        (lambda: mean_interval([1.0, 2.0], strata=[0]), "columns, strata need the same length"),
        (lambda: mean_interval([1.0, 2.0], clusters=[0, 0], strata=[0, 1]), "an image lies in two strata"),
        (lambda: seeds_interval([1.0, 2.0]), "rows, seeds"),
        (lambda: seeds_interval([[1.0, 2.0]] * 2, clusters=[0, 0], strata=[0, 1]), "an image lies in two strata"),
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


# ---- strata


def strata_of(sizes, means=None, sds=None, seed=0):
    """Values with exactly these means and standard deviations, and the stratum of each."""
    rng = np.random.default_rng(seed)
    means, sds = means or [0.0] * len(sizes), sds or [1.0] * len(sizes)
    parts = [m + s * scipy.stats.zscore(rng.normal(size=n), ddof=1) for n, m, s in zip(sizes, means, sds, strict=True)]
    return np.concatenate(parts), np.repeat(np.arange(len(sizes)), sizes)


@pytest.mark.parametrize("method", ["BCa", "percentile"])
def test_stratified_mean_has_the_variance_of_its_closed_form(method):
    """Of three strata that count alike: a ninth of the sum of their variances over their sizes (Cochran 1977, 5.3)."""
    values, strata = strata_of([50, 150, 400], [0.0, 40.0, 90.0], [3.0, 6.0, 12.0])
    found = mean_interval(values, strata=strata, method=method, resamples=8000)
    half = 1.96 * np.sqrt(9 / 50 + 36 / 150 + 144 / 400) / 3
    assert found.value == pytest.approx(130 / 3) and found.n == 600
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.1 * half)
    naive = mean_interval(values, method=method)
    assert naive.high - naive.low > 4 * half  # what lies between strata is not chance


def test_strata_of_one_label_change_nothing_and_questions_of_an_image_stay_together():
    values = np.random.default_rng(1).exponential(1.0, 40)
    assert mean_interval(values, strata=["x"] * 40) == mean_interval(values)
    values, strata = strata_of([30, 60])
    repeated, image = np.repeat(values, 4), np.repeat(np.arange(90), 4)
    whole = mean_interval(repeated, clusters=image, strata=np.repeat(strata, 4))
    assert whole == pytest.approx(mean_interval(values, strata=strata)) and whole.n == 90


def test_shares_and_differences_draw_within_strata_too():
    values, strata = strata_of([40, 80], [5.0, 50.0], [1.0, 1.0])
    half = 1.96 * np.sqrt(1 / 40 + 1 / 80) / 2
    share = mean_interval(values, over=np.ones(120), strata=strata)
    assert share.value == pytest.approx(27.5) and share.high - share.low == pytest.approx(2 * half, rel=0.1)
    difference = difference_interval(values + 3, np.full(120, 3.0), strata=strata)
    assert difference == pytest.approx(mean_interval(values, strata=strata))


def test_strata_without_spread_and_of_one_image():
    assert mean_interval([1.0, 1.0, 9.0, 9.0], strata=[0, 0, 1, 1]) == (5.0, 5.0, 5.0, 4)
    assert np.isnan(mean_interval([1.0, 9.0], strata=[0, 1]).low)  # nothing to draw
    one = mean_interval([0.0, 2.0, 4.0, 50.0], strata=[0, 0, 0, 1], method="percentile")
    alone = mean_interval([0.0, 2.0, 4.0], method="percentile")
    assert (one.value, one.low, one.high) == pytest.approx([(x + 50) / 2 for x in alone[:3]])
    gone = mean_interval([1.0, 2.0, np.nan, np.nan], strata=[0, 0, 1, 1], missing="drop")
    assert gone.value == 1.5 and gone.n == 2


# ---- seeds


def test_seeds_alone_have_students_interval_and_images_alone_the_normal_one():
    seeds = np.array([1.0, 2.5, 3.0])
    found, df = seeds_interval(np.tile(seeds, (50, 1)))
    expected = scipy.stats.t.interval(0.95, 2, seeds.mean(), scipy.stats.sem(seeds))
    assert found[:3] == pytest.approx((seeds.mean(), *expected)) and df == pytest.approx(2) and found.n == 50
    values, _ = strata_of([2000], [1.0], [4.0])
    found, df = seeds_interval(np.tile(values[:, None], (1, 5)))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 4 / np.sqrt(2000), rel=0.01) and df == pytest.approx(1999)


def test_variances_of_seeds_and_of_images_within_strata_add():
    values, strata = strata_of([60, 240], [10.0, 80.0], [2.0, 5.0])
    seeds = np.array([-0.5, 0.1, 0.4, 0.8])
    found, df = seeds_interval(values[:, None] + seeds, strata=strata)
    of_seeds, of_first, of_second = seeds.var(ddof=1) / 4, 4 / 60 / 4, 25 / 240 / 4
    variance = of_seeds + of_first + of_second
    parts = {3: of_seeds, 59: of_first, 239: of_second}
    quantile = sum(of * scipy.stats.t.ppf(0.975, free) for free, of in parts.items()) / variance
    assert found.value == pytest.approx(45 + seeds.mean())
    assert found.high - found.value == pytest.approx(quantile * np.sqrt(variance))
    assert scipy.stats.t.ppf(0.975, df) == pytest.approx(quantile) and 3 < df < 239


def test_intervals_over_seeds_and_images_cover_the_truth():
    """Three seeds with effects of their own on fifty images: a bootstrap over images alone covers far too seldom."""
    both, images = 0, 0
    for trial in range(300):
        rng = np.random.default_rng(trial)
        values = rng.normal(0, 1, 3) + rng.normal(0, 2, (50, 1)) + rng.normal(0, 1, (50, 3))
        found, _ = seeds_interval(values)
        both += found.low <= 0 <= found.high
        error = 1.96 * values.mean(1).std(ddof=1) / np.sqrt(50)
        images += abs(values.mean()) <= error
    assert 0.92 <= both / 300 and images / 300 < 0.75


def test_seeds_of_one_training_without_rows_and_with_gaps():
    found, df = seeds_interval([[1.0], [3.0]])
    assert found.value == 2.0 and np.isnan([found.low, found.high, df]).all() and found.n == 2
    found, _ = seeds_interval([[np.nan, 1.0]])
    assert np.isnan(found.value) and found.n == 0
    found, _ = seeds_interval([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]])  # a row that lacks a seed counts nowhere
    assert found.value == 3.5 and found.n == 2
    assert seeds_interval(np.full((4, 3), 7.0))[0] == (7.0, 7.0, 7.0, 4)


def test_one_source_of_chance_alone_has_its_own_degrees_of_freedom():
    """To the last digit the quantile may lie beside that of the one part that varies."""
    for n in range(2, 40):
        values = np.random.default_rng(n).normal(size=(n, 1))
        assert seeds_interval(np.tile(values, (1, 2)))[1] == pytest.approx(n - 1, rel=1e-6)
        assert seeds_interval(np.tile(values.T, (3, 1)))[1] == pytest.approx(n - 1, rel=1e-6)


def test_rule_of_three_is_the_binomial_tail_and_power_that_of_the_z_test():
    assert scipy.stats.binom.cdf(0, 40, rule_of_three(40)) == pytest.approx(0.05)
    from statsmodels.stats.power import NormalIndPower

    interval = Interval(0.0, -1.96 * 3 / 10, 1.96 * 3 / 10, 100)  # a standard deviation of 3
    needed = images_needed(interval, 0.5)
    expected = NormalIndPower(ddof=0).solve_power(0.5 / 3, power=0.8, alpha=0.05, ratio=0)  # one sample
    assert needed == pytest.approx(expected, rel=0.01)
    assert np.isnan(images_needed(Interval(0.0, 0.0, 0.0, 9), 1.0)) and np.isnan(images_needed(interval, 0.0))
    half = scipy.stats.t(3).ppf(0.975) * 3 / 10  # the same standard error, of four seeds
    of_seeds = Interval(0.0, -half, half, 100)
    assert images_needed(of_seeds, 0.5, df=3) == pytest.approx(expected, rel=0.01)
    assert np.isnan(images_needed(of_seeds, 0.5, df=1.3))  # two seeds
