"""Bootstrap intervals over samples: how far a number would move with other samples of the same kind.

The interval is bias-corrected and accelerated (BCa: Efron 1987), which corrects for skewed samples such as losses.
It does not exist where all resamples lie on one side of the value; then percentiles are taken (Efron 1979).
`scipy.stats.bootstrap` gives the same numbers from the same seed (a test compares them); importing it takes a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .results import Estimate

RESAMPLES = 4000
COVERAGE = 0.95
TAILS = (1 - COVERAGE) / 2, (1 + COVERAGE) / 2
NORMAL = NormalDist()
BATCH = 256
"""Resamples drawn at a time, which bounds the memory for thousands of samples."""

_Array = NDArray[np.float64]


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Estimate:
    """Return a ratio of two sums over samples, such as loss over tokens, with its 95 % interval.

    Whole samples are drawn, so what belongs to one stays together: with differences of two rows on the same samples the
    interval is a paired one. One sample shows no spread; its interval is the number itself.

    Raises:
        ValueError: if there is no sample, or the sequences differ in length.
    """
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    if above.shape != below.shape or above.size == 0:
        raise ValueError(f"needs as many numerators as denominators, at least one; got {above.size} and {below.size}")
    value = float(above.sum() / below.sum())
    if above.size == 1:
        return Estimate.exact(value)

    def statistic(drawn: _Array, weights: _Array, axis: int) -> Any:
        return drawn.sum(axis) / weights.sum(axis)

    return _estimate(value, (above, below), statistic, seed, paired=True)


def mean_of_means(groups: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """Return the mean of each group's mean, such as an average over data sets, with its 95 % interval.

    Samples are drawn within their group, so that every group keeps its size and its weight.

    Raises:
        ValueError: if there is no group, or one without a sample.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("needs at least one group, and a sample in each")
    value = float(np.mean([np.mean(group) for group in groups]))
    varying = [np.asarray(group, float) for group in groups if len(group) > 1]
    fixed = sum(float(group[0]) for group in groups if len(group) == 1)
    if not varying:
        return Estimate.exact(value)

    def statistic(*drawn: _Array, axis: int) -> Any:
        return (fixed + sum(group.mean(axis) for group in drawn)) / len(groups)

    return _estimate(value, varying, statistic, seed, paired=False)


def _estimate(
    value: float, samples: Sequence[_Array], statistic: Callable[..., Any], seed: int, *, paired: bool
) -> Estimate:
    drawn = _resampled(samples, statistic, np.random.default_rng(seed), paired=paired)
    tails = _accelerated_tails(value, samples, statistic, drawn, paired=paired) or TAILS
    low, high = (float(end) for end in np.quantile(drawn, tails))
    return Estimate(value, min(value, low), max(value, high))


def _resampled(
    samples: Sequence[_Array], statistic: Callable[..., Any], rng: np.random.Generator, *, paired: bool
) -> _Array:
    """Return the statistic of every resample, `[RESAMPLES]`."""
    found = []
    for start in range(0, RESAMPLES, BATCH):
        count = min(BATCH, RESAMPLES - start)
        sizes = [samples[0].size] if paired else [each.size for each in samples]
        places = [rng.integers(0, size, (count, size)) for size in sizes]
        each_places = places * len(samples) if paired else places
        found.append(statistic(*(each[at] for each, at in zip(samples, each_places, strict=True)), axis=-1))
    return np.concatenate(found)


def _accelerated_tails(
    value: float, samples: Sequence[_Array], statistic: Callable[..., Any], drawn: _Array, *, paired: bool
) -> tuple[float, float] | None:
    """Return the quantiles of the resamples that bound the BCa interval (Efron 1987); None where it does not exist."""
    below = float(np.count_nonzero(drawn < value) + np.count_nonzero(drawn <= value)) / (2 * drawn.size)
    cubes = squares = 0.0
    for group in [None] if paired else range(len(samples)):
        left_out = _without_each(samples, statistic, group)
        influence = (left_out.size - 1) * (left_out.mean() - left_out)
        cubes += float((influence**3).sum()) / left_out.size**3
        squares += float((influence**2).sum()) / left_out.size**2
    if not 0 < below < 1 or not squares > 0:
        return None
    acceleration, bias = cubes / (6 * squares**1.5), NORMAL.inv_cdf(below)
    tails = []
    for tail in TAILS:
        shifted = bias + NORMAL.inv_cdf(tail)
        scale = 1 - acceleration * shifted
        if scale == 0:
            return None
        tails.append(NORMAL.cdf(bias + shifted / scale))
    return tails[0], tails[1]


def _without_each(samples: Sequence[_Array], statistic: Callable[..., Any], group: int | None) -> _Array:
    """Return the statistic without each sample in turn: of one group, or of all at once where they are paired."""
    size, found = samples[group or 0].size, []
    for start in range(0, size, BATCH):
        rows = np.arange(start, min(start + BATCH, size))[:, None]
        kept = np.arange(size - 1) + (np.arange(size - 1) >= rows)
        parts = [each[kept] if group in (None, index) else each[None] for index, each in enumerate(samples)]
        found.append(statistic(*parts, axis=-1))
    return np.concatenate(found)
