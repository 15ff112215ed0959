import warnings

import numpy as np
import pytest
import scipy.stats

from kvmix_cli.evaluation import bootstrap
from kvmix_cli.evaluation.bootstrap import mean_of_means, ratio
from kvmix_cli.evaluation.results import Estimate


def test_the_value_is_the_ratio_of_the_sums():
    estimate = ratio([1.0, 2.0, 6.0], [10, 20, 30])
    assert estimate.value == pytest.approx(9 / 60)
    assert estimate.low <= estimate.value <= estimate.high


def test_the_same_seed_gives_the_same_interval_and_another_does_not():
    numbers = np.random.default_rng(1).normal(size=20)
    assert ratio(numbers, [1] * 20, seed=3) == ratio(numbers, [1] * 20, seed=3)
    assert ratio(numbers, [1] * 20, seed=3) != ratio(numbers, [1] * 20, seed=4)


@pytest.mark.slow
def test_95_percent_intervals_cover_the_truth_about_that_often():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        estimate = ratio(rng.normal(5.0, 2.0, size=40), [1.0] * 40, seed=trial)
        covered += estimate.low <= 5.0 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_paired_interval_is_far_narrower_than_the_spread_of_the_samples():
    rng = np.random.default_rng(0)
    reference = rng.normal(100, 30, size=30)
    changed = reference + rng.normal(1.0, 0.1, size=30)
    paired, alone = ratio(changed - reference, [1] * 30), ratio(changed, [1] * 30)
    assert paired.low > 0.9
    assert paired.high < 1.1
    assert alone.high - alone.low > 10


def test_an_interval_of_skewed_samples_reaches_further_to_their_long_side():
    numbers = np.random.default_rng(3).lognormal(0, 1, size=30)
    estimate = ratio(numbers, [1.0] * 30)
    assert estimate.high - estimate.value > 1.2 * (estimate.value - estimate.low)


@pytest.mark.parametrize("numbers", [[2.0] * 5, [0.0] * 7, [1.0, 1.0, 1.0, 0.0]])
def test_samples_that_are_all_or_nearly_alike_have_an_interval(numbers):
    estimate = ratio(numbers, [1.0] * len(numbers))
    assert min(numbers) <= estimate.low <= estimate.value <= estimate.high <= max(numbers)


def test_one_sample_has_no_interval():
    estimate = ratio([3.0], [2.0])
    assert estimate.value == estimate.low == estimate.high == 1.5


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0])])
def test_mismatched_or_missing_samples_are_refused(above, below):
    with pytest.raises(ValueError, match="needs as many"):
        ratio(above, below)


def test_a_mean_of_means_gives_every_group_the_same_weight():
    estimate = mean_of_means([[0.0], [10.0, 20.0, 30.0]])
    assert estimate.value == 10
    assert 5 <= estimate.low < 10 < estimate.high <= 15


def test_a_mean_of_means_varies_by_what_varies_within_its_groups():
    rng = np.random.default_rng(0)
    groups = [rng.normal(center, spread, size) for center, spread, size in ((0, 3, 100), (1000, 1, 50), (-500, 6, 200))]
    estimate = mean_of_means(groups)
    error = sum(np.var(group) / group.size for group in groups) ** 0.5 / 3
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_groups_of_one_sample_are_weighed_and_add_no_spread():
    assert mean_of_means([[3.0], [5.0]]) == Estimate.exact(4.0)
    alone = mean_of_means([[10.0, 20.0, 30.0]])
    half = mean_of_means([[10.0, 20.0, 30.0], [0.0]])
    assert half.high - half.low == pytest.approx((alone.high - alone.low) / 2)


@pytest.mark.parametrize("groups", [[], [[1.0], []]])
def test_a_mean_of_nothing_is_refused(groups):
    with pytest.raises(ValueError, match="a sample in each"):
        mean_of_means(groups)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 3, 10, 40, 300])
def test_intervals_are_those_of_scipy(seed, count):
    """From the same seed, to the last digits: of paired samples, and of groups of different sizes."""
    rng = np.random.default_rng(seed)
    above, below = rng.gamma(0.7, 1.0, count), rng.integers(1, 50, count).astype(float)

    def reference(samples, statistic, paired):
        options = {"paired": paired, "vectorized": True, "n_resamples": bootstrap.RESAMPLES, "batch": bootstrap.BATCH}
        for method in ("BCa", "percentile"):
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                rng = np.random.default_rng(seed)
                found = scipy.stats.bootstrap(samples, statistic, method=method, rng=rng, **options).confidence_interval
            if np.isfinite([found.low, found.high]).all():
                return found
        raise AssertionError

    found = ratio(above, below, seed)
    wanted = reference((above, below), lambda x, y, axis: x.sum(axis) / y.sum(axis), True)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    groups = [above, rng.normal(size=count + 3), rng.normal(size=2)]
    found = mean_of_means(groups, seed)
    wanted = reference(groups, lambda *drawn, axis: sum(each.mean(axis) for each in drawn) / len(drawn), False)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
