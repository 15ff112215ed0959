"""Directions of other methods: what an error along one of them costs, and which channels stay together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from with_moments import DIM, random_metric

from kvmix_cli.plan.tensors.directions import basis_along
from kvmix_cli.plan.tensors.metric import basis_of
from kvmix_cli.plan.tensors.moments import Rope


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, DIM), st.sampled_from(["variance", "channels"]))
def test_an_error_along_a_direction_costs_what_the_metric_says(seed, rank, directions):
    metric, covariance = random_metric(seed), random_metric(seed + 1, rank)
    encode, decode, eigenvalues = basis_along(directions, metric, covariance)
    # float64, products of 8 numbers: 1e-8 is far above their rounding
    np.testing.assert_allclose(encode @ decode, np.broadcast_to(np.eye(DIM), encode.shape), atol=1e-8)
    along = np.einsum("hji,hjk,hki->hi", decode, metric, decode)  # of an error of 1 in each coordinate alone
    np.testing.assert_allclose(along, 1, rtol=1e-8)  # a metric of full rank needs no floor
    coordinates = encode @ covariance @ encode.transpose(0, 2, 1)
    own = np.diagonal(coordinates, axis1=1, axis2=2)
    np.testing.assert_allclose(own, eigenvalues, atol=1e-8 * eigenvalues.max())
    assert (np.diff(eigenvalues) <= 0).all()
    if directions == "variance":
        np.testing.assert_allclose(coordinates, own[:, :, None] * np.eye(DIM), atol=1e-8 * eigenvalues.max())


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_channels_that_rotate_into_each_other_stay_together(layout):
    pairs = Rope(np.ones(3), layout, 2).pairs
    mates = {(2, 5), (3, 6), (4, 7)} if layout == "half" else {(2, 3), (4, 5), (6, 7)}
    assert set(map(tuple, pairs.tolist())) == mates
    encode, _, eigenvalues = basis_along("channels", random_metric(7), random_metric(8), pairs=pairs)
    assert ((encode != 0).sum(-1) == 1).all() and ((encode != 0).sum(-2) == 1).all(), "each direction is one channel"
    for order, own in zip((encode != 0).argmax(-1).tolist(), eigenvalues, strict=True):
        for one, other in mates:
            assert own[order.index(one)] == own[order.index(other)]
            assert abs(order.index(one) - order.index(other)) == 1


def test_the_metrics_own_directions_and_a_head_nobody_attends_to():
    metric, covariance = random_metric(2), random_metric(3)
    metric[1] = 0
    found = basis_along("variance", metric, covariance)
    assert 0 < found.eigenvalues[1].sum() < 1e-15 * found.eigenvalues[0].sum()
    np.testing.assert_allclose(found.encode @ found.decode, np.broadcast_to(np.eye(DIM), metric.shape), atol=1e-8)
    np.testing.assert_array_equal(basis_along("loss", metric, covariance).encode, basis_of(metric, covariance).encode)


@pytest.mark.parametrize(
    ("metric", "covariance", "fault"),
    [
        (np.full((1, 2, 2), np.nan), np.zeros((1, 2, 2)), "finite"),
        (np.zeros((1, 2, 2)), np.zeros((1, 3, 3)), r"got \[1, 2, 2\] and \[1, 3, 3\]"),
    ],
)
def test_statistics_that_are_no_pair_of_matrices_are_refused(metric, covariance, fault):
    with pytest.raises(ValueError, match=fault):
        basis_along("variance", metric, covariance)
