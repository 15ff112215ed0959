"""Percentile bootstrap over samples (Efron 1979): how far a number would move with other samples of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .results import Estimate

RESAMPLES = 4000
COVERAGE = 95.0


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Estimate:
    """A ratio of two sums over samples, such as loss over tokens, with its 95 % interval.

    Whole samples are drawn, so what belongs to one stays together: give differences of two rows on the same samples
    and the interval is a paired one. One sample has no spread to judge from; its interval is the number itself.

    Raises:
        ValueError: if there is no sample, or the sequences differ in length.
    """
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    if above.shape != below.shape or above.size == 0:
        raise ValueError(f"needs as many numerators as denominators, at least one; got {above.size} and {below.size}")
    drawn = np.random.default_rng(seed).integers(0, above.size, (RESAMPLES, above.size))
    resampled = above[drawn].sum(1) / below[drawn].sum(1)
    tail = (100 - COVERAGE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(float(above.sum() / below.sum()), float(low), float(high))


def mean_of_means(groups: Sequence[Sequence[float]], seed: int = 0) -> Estimate:
    """The mean over groups of each group's mean, such as an average over data sets, with its 95 % interval.

    Samples are drawn within their group, so that every group keeps its size and its weight.

    Raises:
        ValueError: if there is no group, or one without a sample.
    """
    if not groups or not all(len(group) for group in groups):
        raise ValueError("needs at least one group, and a sample in each")
    rng = np.random.default_rng(seed)
    values = [np.asarray(group, float) for group in groups]
    resampled = np.mean(
        [group[rng.integers(0, group.size, (RESAMPLES, group.size))].mean(1) for group in values], axis=0
    )
    low, high = np.percentile(resampled, [(100 - COVERAGE) / 2, (100 + COVERAGE) / 2])
    return Estimate(float(np.mean([group.mean() for group in values])), float(low), float(high))
