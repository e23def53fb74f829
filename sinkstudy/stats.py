"""Intervals and tests for the numbers of the study: bootstrap and sign flips over images, Wilson, McNemar, Holm.

The unit that is drawn again, or flipped, is the *image*. Tokens, heads or questions of one image are not independent,
so a function that gets several rows an image needs `clusters`, the image of each row, and keeps images whole.
Every function is seeded: the same data give the same interval and the same p-value.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

RESAMPLES = 2000
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


def mean_interval(
    values: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    method: str = "BCa",
    resamples: int = RESAMPLES,
    seed: int = 0,
    missing: str = "raise",
) -> Interval:
    """Mean over all rows, with a bootstrap interval over images.

    Args:
        values: [rows], one number a row; one row an image unless `clusters` says otherwise.
        clusters: [rows], the image of each row. With it the mean is still the mean of the rows, but whole images
            are drawn (cluster bootstrap; Davison & Hinkley 1997, section 3.8).
        level: coverage, 0–1.
        method: "BCa" (bias-corrected and accelerated; Efron 1987) or "percentile".
        resamples: number of bootstrap samples.
        seed: of the bootstrap.
        missing: "raise" or "drop" rows that are not finite. Where "drop" leaves none, all is NaN and `n` is 0.

    Returns:
        The mean in the unit of `values`; `n` is the number of images. Low and high are NaN for one image.

    Raises:
        ValueError: no rows, rows that are not finite, lengths that differ, an unknown method or `missing`.
    """
    (sums,), sizes = _per_image([values], clusters, missing)
    return _bootstrap(_ratio, [sums, sizes], _leave_one_out(sums, sizes), level, method, resamples, seed)


def ratio_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    method: str = "BCa",
    resamples: int = RESAMPLES,
    seed: int = 0,
    missing: str = "raise",
) -> Interval:
    """Ratio of two means, mean(numerator) / mean(denominator), with a paired bootstrap interval over images.

    Both quantities are seen on the same images (say, attention received by sinks and by other tokens), so they are
    drawn together. This is the ratio of the means, not the mean of ratios, which one small denominator can rule.

    Args:
        numerator: [rows].
        denominator: [rows], of the same images in the same order.
        clusters: [rows], the image of each row, if there are several rows an image.
        level, method, resamples, seed, missing: as in `mean_interval`; a row is dropped where either is missing.

    Returns:
        The ratio (no unit); `n` is the number of images.

    Raises:
        ValueError: as `mean_interval`, or a denominator whose mean is not above zero.
    """
    (above, below), _ = _per_image([numerator, denominator], clusters, missing)
    if len(below) and below.sum() <= 0:
        raise ValueError("the mean of the denominator must be above zero")
    return _bootstrap(_ratio, [above, below], _leave_one_out(above, below), level, method, resamples, seed)


def difference_interval(
    first: ArrayLike,
    second: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    method: str = "BCa",
    resamples: int = RESAMPLES,
    seed: int = 0,
    missing: str = "raise",
) -> Interval:
    """Mean of first − second over the same images, with a paired bootstrap interval.

    Args:
        first, second: [rows], the two conditions on the same rows in the same order.
        clusters: [rows], the image of each row, if there are several rows (questions) an image.
        level, method, resamples, seed, missing: as in `mean_interval`; a row is dropped where either is missing.

    Returns:
        The difference in the unit of the values; `n` is the number of images.

    Raises:
        ValueError: as `mean_interval`.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(first) != len(second):
        raise ValueError(f"paired values need the same length: {len(first)} and {len(second)}")
    return mean_interval(
        first - second,
        clusters=clusters,
        level=level,
        method=method,
        resamples=resamples,
        seed=seed,
        missing=missing,
    )


def pooled_interval(
    statistic: Callable[..., np.ndarray],
    *columns: ArrayLike,
    level: float = 0.95,
    method: str = "BCa",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Any statistic of what images give together, with a paired bootstrap interval over images.

    For statistics that are no mean of a number an image, such as a standard deviation of pooled values: they are
    computed again from every draw of images.

    Args:
        statistic: gets the columns with their images drawn again, each [draws, images, ..]; returns [draws].
        columns: [images, ..] each, of the same images in the same order.
        level, method, resamples, seed: as in `mean_interval`.

    Returns:
        The statistic of all images; `n` is the number of images. Low and high are NaN for one image, all is NaN for
        none.

    Raises:
        ValueError: values that are not finite, numbers of images that differ, an unknown method.
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
    left_out = [float(of(np.delete(index, image))) for image in index] if len(index) > 1 else []
    per_image = sum(column[:1].size for column in columns)
    return _bootstrap(of, [index], left_out, level, method, resamples, seed, per_image)


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """A share of independent yes/no outcomes with Wilson's score interval (Wilson 1927).

    Args:
        successes: number of hits, 0–n.
        n: number of independent trials. Several questions about one image are not independent: give their
            hits to `mean_interval(..., clusters=image)` instead.
        level: coverage, 0–1.

    Returns:
        The share, 0–1.

    Raises:
        ValueError: n < 1, or successes outside 0–n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, not {successes} of {n}")
    low, high = scipy.stats.binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(low), float(high), int(n))


def sign_flip_test(
    first: ArrayLike,
    second: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    resamples: int = 9999,
    seed: int = 0,
    missing: str = "raise",
) -> float:
    """Two-sided p-value of a paired permutation test: do two conditions differ in their mean?

    Under the hypothesis that the labels of the conditions mean nothing, each image's difference has either sign with
    equal chance. All 2^images patterns of signs are tried where `resamples` allows as many, else so many random ones,
    with the observed pattern counted among them, so that p is never 0 (Phipson & Smyth 2010).

    Args:
        first, second: [rows], the two conditions on the same rows in the same order.
        clusters: [rows], the image of each row. The differences of one image change sign together.
        resamples: the number of random patterns of signs.
        seed: of the random patterns.
        missing: "raise" or "drop" rows in which either is not finite.

    Returns:
        p, 0–1; NaN if no row is left.

    Raises:
        ValueError: as `difference_interval`.
    """
    (above, below), _ = _per_image([first, second], clusters, missing)
    differences = above - below  # [images], summed over the rows of an image: flipping it flips them all
    if not len(differences):
        return float("nan")
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
    only_first, only_second = int((first > second).sum()), int((first < second).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


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
    order = made[np.argsort(p[made], kind="stable")]
    adjusted = np.full(p.shape, np.nan)
    scaled = p[order] * np.arange(len(order), 0, -1)  # the smallest times m, the next times m − 1, …
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def _per_image(
    columns: list[ArrayLike], clusters: ArrayLike | None, missing: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """Sum of each column within each image, each [images], and the number of rows of each image, [images]."""
    if missing not in ("raise", "drop"):
        raise ValueError(f"missing is 'raise' or 'drop', not {missing!r}")
    columns = [np.asarray(column, dtype=np.float64) for column in columns]
    for column in columns:
        if column.ndim != 1 or len(column) == 0:
            raise ValueError(f"need one number a row, not an array of shape {column.shape}")
    rows = {len(column) for column in columns} | ({len(clusters)} if clusters is not None else set())
    if len(rows) > 1:
        raise ValueError(f"columns and clusters need the same length, not {sorted(rows)}")
    known = np.logical_and.reduce([np.isfinite(column) for column in columns])
    if not known.all() and missing == "raise":
        raise ValueError(
            f"{(~known).sum()} of {len(known)} values are not finite: leave them out (missing='drop') and say how many"
        )
    columns = [column[known] for column in columns]
    if clusters is None:
        return columns, np.ones(len(columns[0]))
    _, image = np.unique(np.asarray(clusters)[known], return_inverse=True)  # [rows]
    return [np.bincount(image, weights=column) for column in columns], np.bincount(image).astype(float)


def _ratio(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
    return above.sum(axis) / below.sum(axis)


def _leave_one_out(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The ratio without each image, [images]."""
    return (above.sum() - above) / (below.sum() - below) if len(above) > 1 else above


def _bootstrap(
    statistic: Callable,
    columns: list[np.ndarray],
    left_out: ArrayLike,
    level: float,
    method: str,
    resamples: int,
    seed: int,
    per_image: int = 1,
) -> Interval:
    """`scipy.stats.bootstrap` of a statistic of paired columns, each [images]; without spread, a point.

    `left_out` is the statistic without each image, `per_image` how many values an image has in memory.
    """
    if method not in ("BCa", "percentile"):
        raise ValueError(f"method is 'BCa' or 'percentile', not {method!r}")
    n = len(columns[0])
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    value = float(statistic(*columns))
    if n == 1:
        return Interval(value, float("nan"), float("nan"), n)
    if np.ptp(left_out) <= 1e-12 * abs(value):  # no image moves the estimate
        return Interval(value, value, value, n)
    interval = scipy.stats.bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _CELLS // (n * per_image)),
        confidence_level=level,
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(interval.low), float(interval.high), n)
