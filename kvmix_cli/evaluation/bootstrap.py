"""Bootstrap intervals over samples: how far a number would move with other samples of the same kind.

The interval is bias-corrected and accelerated (BCa: Efron 1987), which corrects for skewed samples such as losses.
It does not exist where all resamples lie on one side of the value; then percentiles are taken (Efron 1979).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .results import Estimate

RESAMPLES = 4000
COVERAGE = 0.95
FEWER = 1000
"""The same for a quantile, each of which takes all numbers of all samples."""
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


def proportion(successes: Sequence[int], trials: Sequence[int], seed: int = 0) -> Estimate:
    """Return the share of all samples' trials that succeeded, such as values that were recalled, with its interval.

    Whole samples are drawn. Where all trials succeeded, or none, drawing shows no spread; then the interval is that of
    Wilson (1927), with a sample as one trial.

    Raises:
        ValueError: as `ratio`.
    """
    found = ratio(successes, trials, seed)
    if found.value not in (0, 1):
        return found
    from scipy.stats import binomtest

    interval = binomtest(round(found.value) * len(trials), len(trials)).proportion_ci(method="wilson")
    return Estimate(found.value, min(found.value, float(interval.low)), max(found.value, float(interval.high)))


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


def pooled_quantile(groups: Sequence[Sequence[float]], share: float, seed: int = 0) -> Estimate:
    """Return a quantile of the numbers of all samples together, with its 95 % interval.

    Whole samples are drawn, as in `ratio`. One sample shows no spread; its interval is the number itself.

    Args:
        groups: each sample's numbers.
        share: share of the numbers that lie below, 0 to 1.

    Raises:
        ValueError: if there is no sample, or one without a number.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("needs at least one sample, and a number in each")
    arrays = [np.asarray(group, float) for group in groups]
    value = float(np.quantile(np.concatenate(arrays), share))
    if len(arrays) == 1:
        return Estimate.exact(value)

    def of_one(drawn: _Array) -> float:
        return float(np.quantile(np.concatenate([arrays[int(index)] for index in drawn]), share))

    def statistic(drawn: _Array, axis: int) -> Any:
        return np.apply_along_axis(of_one, axis, drawn)

    return _estimate(value, [np.arange(len(arrays), dtype=float)], statistic, seed, paired=False, resamples=FEWER)


def _estimate(
    value: float,
    samples: Sequence[_Array],
    statistic: Callable[..., Any],
    seed: int,
    *,
    paired: bool,
    resamples: int = RESAMPLES,
) -> Estimate:
    from scipy.stats import bootstrap

    low = high = value
    found = None
    for method, count in (("BCa", resamples), ("percentile", 0)):  # of the same resamples
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # samples that are all alike have no acceleration
            found = bootstrap(
                samples,
                statistic,
                paired=paired,
                vectorized=True,
                n_resamples=count,
                bootstrap_result=found,
                batch=BATCH,
                confidence_level=COVERAGE,
                method=method,
                rng=np.random.default_rng(seed),
            )
        low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
        if np.isfinite(low) and np.isfinite(high):
            break
    return Estimate(value, min(value, low), max(value, high))
