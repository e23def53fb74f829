"""Intervals and tests for the numbers of the study: bootstrap and sign flips over images, Wilson, McNemar, Holm.

The unit that is drawn again, or flipped, is the *image*. Tokens, heads or questions of one image are not independent,
so a function that gets several rows an image needs `clusters`, the image of each row, and keeps images whole. Images
of several benchmarks are no sample of one population: `strata`, the benchmark of each row, has every benchmark count
alike and draws images within each. What was trained several times has seeds as a further level (`seeds_interval`).
A ratio of two quantities is skewed, and few images rule it: its interval is Student's, of its logarithm
(`ratio_interval`). Every bootstrap is seeded: the same data give the same interval and the same p-value.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats
from numpy.typing import ArrayLike
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

RESAMPLES = 2000
LEVEL = 0.95
"""Coverage of every interval."""
_CELLS = 4_000_000  # resampled values held in memory at once


class Interval(NamedTuple):
    """An estimate, its interval and the number of independent units (images) behind it.

    Unpacks in the order that `report.Results.metric` takes: ``results.metric(name, *interval, unit="%")``.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


NOTHING = Interval(float("nan"), float("nan"), float("nan"), 0)


def mean_interval(
    values: ArrayLike,
    *,
    over: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    method: str = "BCa",
    resamples: int = RESAMPLES,
    seed: int = 0,
    missing: str = "raise",
) -> Interval:
    """Mean over all rows, with a bootstrap interval over images.

    Args:
        values: [rows], one number a row; one row an image unless `clusters` says otherwise.
        over: [rows], of how much each value is a part (points that can be had, tokens that there are): the mean is then
            the share, the sum of `values` over that of `over`.
        clusters: [rows], the image of each row. With it the mean is still the mean of the rows, but whole images
            are drawn (cluster bootstrap; Davison & Hinkley 1997, section 3.8).
        strata: [rows], the benchmark of each row, if there are several. With it the mean is that of the benchmarks'
            means, and as many images as a benchmark has are drawn from each (section 3.2 there), so that differences
            *between* benchmarks add no width. A benchmark of one image adds none either: nothing is known of it.
        method: "BCa" (bias-corrected and accelerated; Efron 1987) or "percentile".
        resamples: number of bootstrap samples.
        seed: of the bootstrap.
        missing: "raise" or "drop" rows that are not finite. Where "drop" leaves none, all is NaN and `n` is 0.

    Returns:
        The mean in the unit of `values`; `n` is the number of images. Low and high are NaN for one image.

    Raises:
        ValueError: no rows, rows that are not finite, lengths that differ, an image in two strata, an unknown method
            or `missing`, or an `over` whose sum is not above zero.
    """
    columns = [values] if over is None else [values, over]
    sums, sizes, strata = _per_image(columns, clusters, strata, missing)
    parts, wholes = sums if over is not None else (*sums, sizes)
    if len(wholes) and wholes.sum() <= 0:
        raise ValueError("the sum of `over` must be above zero")
    left_out = (parts.sum() - parts) / (wholes.sum() - wholes) if len(parts) > 1 else parts  # the ratio without each
    return _bootstrap(_ratio, [parts, wholes], left_out, method, resamples, seed, strata=strata)


def ratio_interval(
    numerator: ArrayLike, denominator: ArrayLike, *, clusters: ArrayLike | None = None, missing: str = "raise"
) -> Interval:
    """Ratio of the means of two quantities, mean(numerator) / mean(denominator), with an interval over images.

    Both are seen on the same images (say, attention received by sinks and by other tokens). This is the ratio of the
    means, not the mean of ratios, which one small denominator can rule. The interval is Student's, with a degree of
    freedom less than there are images, of the *logarithm* of the ratio, with the jackknife's standard error (Efron &
    Tibshirani 1993, chapter 11): a ratio is skewed, and a bootstrap (BCa) of 28 images covered it in 84 to 91 of 100
    cases, this in 91 to 95 (log-normal values; the tests repeat it). Where the ratio without one of the images has no
    logarithm, as its numerator is zero or negative, the interval is that of the ratio itself.

    Args:
        numerator: [rows].
        denominator: [rows], of the same images in the same order.
        clusters: [rows], the image of each row, if there are several rows an image.
        missing: as in `mean_interval`; a row is dropped where either is missing.

    Returns:
        The ratio (no unit); `n` is the number of images. Low and high are NaN for one image, or if a single image has
        all of the denominator.

    Raises:
        ValueError: as `mean_interval`, or a denominator whose mean is not above zero.
    """
    sums, *_ = _per_image([numerator, denominator], clusters, None, missing)
    return _of_ratio(sums[:1], sums[1:])


def ratio_of_ratios_interval(
    numerator: ArrayLike, denominator: ArrayLike, other_numerator: ArrayLike, other_denominator: ArrayLike
) -> Interval:
    """How many times a ratio of means is another, all four seen on the same images.

    Args:
        numerator, denominator, other_numerator, other_denominator: [images] each, in the same order.

    Returns:
        The ratio of `ratio_interval`'s values, with an interval as there. Without images all is NaN and `n` is 0.

    Raises:
        ValueError: as `ratio_interval`, or another numerator whose mean is not above zero.
    """
    columns = [numerator, other_denominator, denominator, other_numerator]
    if not any(len(np.asarray(column)) for column in columns):
        return NOTHING
    sums, *_ = _per_image(columns, None, None, "raise")
    return _of_ratio(sums[:2], sums[2:])


def _of_ratio(above: list[np.ndarray], below: list[np.ndarray]) -> Interval:
    """The product of sums over that of other sums, each of [images], with the jackknife's interval of its logarithm."""
    n = len(above[0])
    if n == 0:
        return NOTHING
    if any(column.sum() <= 0 for column in below):
        raise ValueError("the mean of the denominator must be above zero")
    value = float(np.prod([column.sum() for column in above]) / np.prod([column.sum() for column in below]))
    rest = [np.prod([column.sum() - column for column in side], axis=0) for side in (above, below)]  # [images] each
    if not rest[1].all():  # one image has all of a denominator; of a single image that is so
        return Interval(value, float("nan"), float("nan"), n)
    left_out = rest[0] / rest[1]
    if np.ptp(left_out) <= 1e-12 * abs(value):  # no image moves the estimate
        return Interval(value, value, value, n)
    logarithm = value > 0 and (left_out > 0).all()
    centre, moved = (np.log(value), np.log(left_out)) if logarithm else (value, left_out)
    error = np.sqrt((n - 1) ** 2 / n * np.var(moved, ddof=1))
    ends = centre + scipy.stats.t.ppf((1 + LEVEL) / 2, n - 1) * error * np.array([-1, 1])
    low, high = np.exp(ends) if logarithm else ends
    return Interval(value, float(low), float(high), n)


def difference_interval(first: ArrayLike, second: ArrayLike, **how: Any) -> Interval:
    """Mean of first − second over the same images, with a paired bootstrap interval.

    Args:
        first, second: [rows], the two conditions on the same rows in the same order.
        how: as in `mean_interval`; with `missing="drop"`, a row is dropped where either is missing.

    Returns:
        The difference in the unit of the values; `n` is the number of images.

    Raises:
        ValueError: as `mean_interval`.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(first) != len(second):
        raise ValueError(f"paired values need the same length: {len(first)} and {len(second)}")
    return mean_interval(first - second, **how)


def pooled_interval(
    statistic: Callable[..., np.ndarray], *columns: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Any statistic of what images give together, with a paired bootstrap interval over images.

    For statistics that are no mean of a number an image, such as a standard deviation of pooled values: they are
    computed again from every draw of images.

    Args:
        statistic: gets the columns with their images drawn again, each [draws, images, ..]; returns [draws].
        columns: [images, ..] each, of the same images in the same order.
        resamples, seed: as in `mean_interval`; the interval is BCa.

    Returns:
        The statistic of all images; `n` is the number of images. Low and high are NaN for one image, all is NaN for
        none.

    Raises:
        ValueError: values that are not finite, or numbers of images that differ.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in columns]
    if len({len(column) for column in columns}) != 1:
        raise ValueError(f"columns need the same images, not {[len(column) for column in columns]}")
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError("some values are not finite: leave these images out and say how many")

    def of(images: np.ndarray, axis: int = -1) -> np.ndarray:  # [.., images] -> [..]
        draws = images.reshape(-1, images.shape[-1])
        return statistic(*(column[draws] for column in columns)).reshape(images.shape[:-1])

    index = np.arange(len(columns[0]))
    left_out = np.array([float(of(np.delete(index, image))) for image in index] if len(index) > 1 else [])
    per_image = sum(column[:1].size for column in columns)
    return _bootstrap(of, [index], left_out, "BCa", resamples, seed, per_image)


def seeds_interval(
    values: ArrayLike, *, clusters: ArrayLike | None = None, strata: ArrayLike | None = None
) -> tuple[Interval, float]:
    """Mean over rows and seeds of what was trained several times, with a t interval over seeds *and* images.

    All seeds see the same images, so the two levels are crossed and their variances add: that of the seeds' means,
    divided by the number of seeds, and that of the images' means over seeds, within each stratum. What is left when
    both are taken out is in both sums, so the interval is rather too wide than too narrow. Its quantile is that of
    Cochran and Cox (1950), the mean of the parts' own quantiles of t, weighted by their variances: with few seeds it
    keeps its level, which Satterthwaite's degrees of freedom do not quite. A bootstrap that draws three seeds out of
    three instead has ten different draws, and is too narrow by a third of the variance and by t against z; a t
    interval over the seeds' means alone speaks of these images and of no others.

    Args:
        values: [rows, seeds], the same rows under each seed; for a paired comparison, differences.
        clusters: [rows], the image of each row, if there are several rows an image.
        strata: [rows], the benchmark of each row, as in `mean_interval`.

    Returns:
        The mean with `n` the number of images, and the degrees of freedom of the t that has this quantile: seeds − 1
        where images do not matter, many where seeds do not. Rows that lack a value under any seed are
        left out. With one seed nothing says how another training would have come out: low, high and the degrees of
        freedom are NaN. Without rows all is NaN and `n` is 0.

    Raises:
        ValueError: not [rows, seeds], lengths that differ, an image in two strata.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"need [rows, seeds], not an array of shape {values.shape}")
    seeds = values.shape[1]
    of_seeds, sizes, stratum = _per_image([*values.T], clusters, strata, "drop")
    if not len(sizes):
        return NOTHING, float("nan")
    means = [_ratio(sums, sizes) for sums in of_seeds]
    value = float(np.mean(means))
    if seeds == 1:
        return Interval(value, float("nan"), float("nan"), len(sizes)), float("nan")
    parts = [(np.var(means, ddof=1) / seeds, seeds - 1)]  # (variance, degrees of freedom) of each source of chance
    sums = np.mean(of_seeds, axis=0)  # [images]
    for images in _drawn_apart(stratum, len(sizes)):
        n, above, below = len(images), sums[images], sizes[images]
        if n > 1:
            rest = above - below * above.sum() / below.sum()  # linearised: what an image moves its stratum's mean by
            parts.append((n / (n - 1) * (rest**2).sum() / sizes.sum() ** 2, n - 1))
    variance = sum(of for of, _ in parts)
    if variance <= (1e-12 * value) ** 2:  # neither a seed nor an image moves it
        return Interval(value, value, value, len(sizes)), float("nan")
    student = partial(scipy.stats.t.ppf, (1 + LEVEL) / 2)
    quantile = sum(of * student(free) for of, free in parts) / variance
    frees = [free for _, free in parts]
    df = scipy.optimize.brentq(lambda free: student(free) - quantile, 0.9 * min(frees), 1.1 * max(frees))
    half = float(quantile * np.sqrt(variance))
    return Interval(value, value - half, value + half, len(sizes)), float(df)


def rule_of_three(n: float) -> float:
    """The largest share, 0–1, that n images without an exception leave possible, about 3 / n.

    Hanley & Lippman-Hand 1983.

    Args:
        n: number of independent images, at least 1. For a mean over strata that count alike: their number times the
            images of the *smallest*, which is exact where all have as many, and never too small a share.
    """
    return 1 - (1 - LEVEL) ** (1 / n)


def images_needed(interval: Interval, effect: float, df: float = np.inf) -> float:
    """How many images would show an effect with a chance of 80 %, at the standard deviation that was measured.

    Normal approximation: the interval's half is 1.96 standard errors, or as many as Student's t has, and these fall
    with the root of the number of images. Where seeds are in the interval, so many times the seeds are needed too.

    Args:
        interval: of this run.
        effect: the distance between the true value and the bound that the whole interval has to clear, above zero.
        df: degrees of freedom behind the interval, if it is Student's; infinite or NaN: taken as normal.

    Returns:
        A number of images, rounded up; NaN if the interval has no width, there is no effect, or the seeds are too few
        (`df` below 2) to say how much they differ.
    """
    error = standard_error((interval.high - interval.low) / 2, df)
    if not error > 0 or not effect > 0 or df < 2:
        return float("nan")
    z = float(scipy.stats.norm.ppf((1 + LEVEL) / 2) + scipy.stats.norm.ppf(0.8))
    needed = interval.n * (z * error / effect) ** 2
    return float(np.ceil(needed))


def standard_error(half: float, df: float = np.inf) -> float:
    """The standard error that half a 95 % interval implies, by Student's t with `df` (infinite or NaN: normal)."""
    return float(half / t_or_normal(df).ppf((1 + LEVEL) / 2))


def t_or_normal(df: float) -> Any:
    """Student's t as scipy has it; the normal distribution where `df` is infinite or NaN, as behind a bootstrap."""
    return scipy.stats.t(df if np.isfinite(df) else np.inf)


def wilson(successes: int, n: int) -> Interval:
    """A share of independent yes/no outcomes with Wilson's score interval (Wilson 1927).

    Args:
        successes: number of hits, 0–n.
        n: number of independent trials. Several questions about one image are not independent: give their
            hits to `mean_interval(..., clusters=image)` instead.

    Raises:
        ValueError: n < 1, or successes outside 0–n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, not {successes} of {n}")
    low, high = scipy.stats.binomtest(int(successes), int(n)).proportion_ci(LEVEL, method="wilson")
    return Interval(successes / n, float(low), float(high), int(n))


def sign_flip_test(
    first: ArrayLike, second: ArrayLike, *, clusters: ArrayLike | None = None, resamples: int = 9999, seed: int = 0
) -> float:
    """Two-sided p-value, 0–1, of a paired permutation test: do two conditions differ in their mean?

    Under the hypothesis that the labels of the conditions mean nothing, each image's difference has either sign with
    equal chance. All 2^images patterns of signs are tried where `resamples` allows as many, else so many random ones,
    with the observed pattern counted among them, so that p is never 0 (Phipson & Smyth 2010).

    Args:
        first, second: [rows], the two conditions on the same rows in the same order.
        clusters: [rows], the image of each row. The differences of one image change sign together.
        resamples: the number of random patterns of signs.
        seed: of the random patterns.

    Raises:
        ValueError: as `difference_interval`.
    """
    (above, below), *_ = _per_image([first, second], clusters, None, "raise")
    differences = above - below  # [images], summed over the rows of an image: flipping it flips them all
    if len(differences) == 1 or not differences.any():
        return 1.0  # both signs of one image give the same |mean|
    test = scipy.stats.permutation_test(
        [differences],
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _CELLS // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def mcnemar_test(first: ArrayLike, second: ArrayLike) -> float:
    """Exact two-sided p-value of McNemar's test: are two conditions right equally often on the same questions?

    Only questions that exactly one condition gets right count; under the hypothesis each falls to either side with
    equal chance (McNemar 1947, with binomial tails).

    Args:
        first, second: bool [questions], right or wrong under each condition, in the same order. The questions are
            taken as independent: one a picture. For several questions a picture use
            `sign_flip_test(..., clusters=image)`.

    Returns:
        p, 0–1; 1 where no question tells the conditions apart.

    Raises:
        ValueError: lengths that differ, no question, or values that are no truth values.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError(f"need one truth value a question in each condition, not {first.shape} and {second.shape}")
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        raise ValueError("McNemar's test takes right or wrong only; compare other scores by sign_flip_test")
    apart = [[0, (first > second).sum()], [(first < second).sum(), 0]]
    return float(mcnemar(apart, exact=True).pvalue) if np.any(apart) else 1.0


def holm(p_values: ArrayLike) -> np.ndarray:
    """p-values adjusted for their number by Holm's step-down procedure (Holm 1979).

    Comparing each with α keeps the chance of any false rejection within α, however the tests depend on one another.

    Args:
        p_values: [tests], 0–1; NaN where no test was made, which counts for nothing.

    Returns:
        [tests], each at least its p, at most 1; NaN stays NaN.

    Raises:
        ValueError: a p outside 0–1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    made = np.flatnonzero(np.isfinite(p))
    if ((p[made] < 0) | (p[made] > 1)).any():
        raise ValueError("a p-value lies between 0 and 1")
    adjusted = np.full(p.shape, np.nan)
    if len(made):
        adjusted[made] = multipletests(p[made], method="holm")[1]
    return adjusted


def _per_image(
    columns: list[ArrayLike], clusters: ArrayLike | None, strata: ArrayLike | None, missing: str
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """Sum of each column within each image, each [images]; the number of rows of each, and its stratum, [images].

    With strata, sums and numbers of rows are weighted so that all strata count alike in the ratio of two sums.
    """
    if missing not in ("raise", "drop"):
        raise ValueError(f"missing is 'raise' or 'drop', not {missing!r}")
    columns = [np.asarray(column, dtype=np.float64) for column in columns]
    for column in columns:
        if column.ndim != 1 or len(column) == 0:
            raise ValueError(f"need one number a row, not an array of shape {column.shape}")
    labels = {"clusters": clusters, "strata": strata}
    rows = {len(of) for of in [*columns, *labels.values()] if of is not None}
    if len(rows) > 1:
        named = ", ".join(["columns", *(name for name, of in labels.items() if of is not None)])
        raise ValueError(f"{named} need the same length, not {sorted(rows)}")
    known = np.logical_and.reduce([np.isfinite(column) for column in columns])
    if not known.all() and missing == "raise":
        raise ValueError(
            f"{(~known).sum()} of {len(known)} values are not finite: leave them out (missing='drop') and say how many"
        )
    columns = [column[known] for column in columns]
    image = np.arange(known.sum())
    if clusters is not None:
        _, image = np.unique(np.asarray(clusters)[known], return_inverse=True)  # [rows]
    weights, stratum = np.ones(len(image)), None
    if strata is not None:
        _, of_row, size = np.unique(np.asarray(strata)[known], return_inverse=True, return_counts=True)
        weights = len(image) / len(size) / size[of_row] if len(size) > 1 else weights
        stratum = np.zeros(image.max(initial=-1) + 1, dtype=int)
        stratum[image] = of_row
        if (stratum[image] != of_row).any():
            raise ValueError("an image lies in two strata: name images of different strata differently")
    sums = [np.bincount(image, weights=column * weights) for column in columns]
    return sums, np.bincount(image, weights=weights), stratum


def _drawn_apart(strata: np.ndarray | None, n: int) -> list[np.ndarray]:
    """The images of each stratum, by their index."""
    return [np.arange(n)] if strata is None else [np.flatnonzero(strata == of) for of in np.unique(strata)]


def _ratio(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
    return above.sum(axis) / below.sum(axis)


def _bootstrap(
    statistic: Callable,
    columns: list[np.ndarray],
    left_out: np.ndarray,
    method: str,
    resamples: int,
    seed: int,
    per_image: int = 1,
    strata: np.ndarray | None = None,
) -> Interval:
    """`scipy.stats.bootstrap` of a statistic of paired columns, each [images]; without spread, a point.

    `left_out` is the statistic without each image, `per_image` how many values an image has in memory, `strata` what
    images are drawn within.
    """
    if method not in ("BCa", "percentile"):
        raise ValueError(f"method is 'BCa' or 'percentile', not {method!r}")
    n = len(columns[0])
    if n == 0:
        return NOTHING
    value = float(statistic(*columns))
    apart = _drawn_apart(strata, n)
    alone = np.concatenate([np.empty(0, dtype=int), *(images for images in apart if len(images) == 1)])
    drawn = [images for images in apart if len(images) > 1]
    if not drawn:
        return Interval(value, float("nan"), float("nan"), n)
    if all(np.ptp(left_out[images]) <= 1e-12 * abs(value) for images in drawn):  # no image moves the estimate
        return Interval(value, value, value, n)

    def of(*images: np.ndarray, axis: int = -1) -> np.ndarray:  # [.., images of a stratum] each -> [..]
        kept = np.broadcast_to(alone, (*images[0].shape[:-1], len(alone)))
        index = np.concatenate([*images, kept], axis=-1)
        return statistic(*(column[index] for column in columns), axis=axis)

    interval = scipy.stats.bootstrap(
        drawn,
        of,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _CELLS // (n * per_image)),
        confidence_level=LEVEL,
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(interval.low), float(interval.high), n)
