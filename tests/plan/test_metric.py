"""The basis of the loss's metric: its definition, and metrics that determine none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from with_moments import DIM, HEADS, random_metric

from kvmix_cli.plan.tensors.metric import basis_of, carrying, needs_shrinkage, spectrum


def floored(metric, floor):
    return metric + floor * np.linalg.norm(metric, axis=(1, 2))[:, None, None] * np.eye(DIM)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, DIM),
    st.integers(1, DIM),
    st.sampled_from([1e-2, 1e-4]),
    st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_half_a_squared_error_of_z_is_the_loss_of_the_error(seed, rank, covariance_rank, floor, scale):
    metric, covariance = scale * random_metric(seed, rank), random_metric(seed + 1, covariance_rank)
    encode, decode, eigenvalues = basis_of(metric, covariance, floor)
    # float64, condition numbers up to DIM / floor: 1e-8 is far above the rounding of a few products
    np.testing.assert_allclose(encode @ decode, np.broadcast_to(np.eye(DIM), encode.shape), atol=1e-8)
    variance = encode @ covariance @ encode.transpose(0, 2, 1)
    expected = np.zeros_like(variance)
    expected[:, range(DIM), range(DIM)] = eigenvalues
    np.testing.assert_allclose(variance, expected, atol=1e-8 * eigenvalues.max())
    assert (np.diff(eigenvalues) <= 0).all() and (eigenvalues >= 0).all()
    error = np.random.default_rng(seed + 2).normal(size=(HEADS, DIM))
    of_z = np.einsum("hij,hj->hi", encode, error)
    loss = np.einsum("hi,hij,hj->h", error, floored(metric, floor), error)
    np.testing.assert_allclose((of_z**2).sum(-1), loss, rtol=1e-8)


@pytest.mark.parametrize("dim", [16, 17, 40, 67])
def test_encode_and_decode_are_inverse_for_heads_of_any_size(dim):
    random = np.random.default_rng(dim)
    metric, covariance = (factors @ factors.transpose(0, 2, 1) for factors in random.normal(size=(2, 2, dim, dim // 2)))
    encode, decode, _ = basis_of(metric, covariance)
    identity = np.broadcast_to(np.eye(dim), encode.shape)
    np.testing.assert_allclose(encode @ decode, identity, atol=1e-9)
    np.testing.assert_allclose(decode @ encode, identity, atol=1e-9)


def test_the_spectrum_sums_to_the_loss_of_keeping_nothing_but_the_mean():
    metric, covariance = random_metric(0), random_metric(1)
    whole = np.trace(metric @ covariance, axis1=1, axis2=2)
    np.testing.assert_allclose(spectrum(metric, covariance, floor=0.0).sum(-1), whole, rtol=1e-9)


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (0.6, 2), (0.89, 3), (0.99, 4), (1.0, 4)])
def test_directions_are_counted_over_all_heads(share, count):
    assert carrying([[5.0, 1.0], [3.0, 1.0]], share) == count


def test_no_loss_is_carried_by_no_direction():
    assert carrying(np.zeros((2, 3)), 0.99) == 0


def test_a_head_nobody_attends_to_has_directions_and_carries_next_to_no_loss():
    metric = random_metric(2)
    metric[1] = 0
    encode, decode, eigenvalues = basis_of(metric, random_metric(3))
    np.testing.assert_allclose(encode[1] @ decode[1], np.eye(DIM), atol=1e-9)
    assert 0 < eigenvalues[1].sum() < 1e-15 * min(eigenvalues[0].sum(), eigenvalues[2].sum())


def test_a_metric_that_has_underflowed_is_that_of_a_head_nobody_attends_to():
    metric = (random_metric(2) * 1e-43).astype(np.float32)
    assert 0 < metric.max() < np.finfo(np.float32).tiny
    encode, decode, eigenvalues = basis_of(metric, random_metric(3))
    np.testing.assert_allclose(encode @ decode, np.broadcast_to(np.eye(DIM), encode.shape), atol=1e-9)
    np.testing.assert_allclose(eigenvalues, basis_of(0 * metric, random_metric(3)).eigenvalues, rtol=1e-6)


def test_fewer_tokens_than_directions_are_shrunk_so_that_every_direction_has_a_variance():
    metric, covariance = random_metric(4, rank=3), random_metric(5, rank=3)
    assert needs_shrinkage(3, DIM) and not needs_shrinkage(DIM, DIM)
    assert np.isclose(spectrum(metric, covariance)[:, -1], 0, atol=1e-12).all()
    found = basis_of(metric, covariance, tokens=3)
    assert (found.eigenvalues > 1e-6).all()
    np.testing.assert_allclose(found.encode @ found.decode, np.broadcast_to(np.eye(DIM), metric.shape), atol=1e-8)
    same = basis_of(metric, covariance, tokens=DIM)
    np.testing.assert_array_equal(same.encode, basis_of(metric, covariance).encode)


@pytest.mark.parametrize(
    ("metric", "covariance", "fault"),
    [
        (np.full((1, 2, 2), np.nan), np.zeros((1, 2, 2)), "finite"),
        (np.zeros((2, 2)), np.zeros((2, 2)), r"expected matrices \[H, D, D\], got \[2, 2\]"),
        (np.zeros((1, 2, 2)), np.zeros((1, 3, 3)), "must have the same shape"),
        (np.diag([1.0, -1e-3])[None], np.eye(2)[None], "without negative eigenvalues"),
    ],
)
def test_statistics_that_are_no_pair_of_matrices_are_refused(metric, covariance, fault):
    with pytest.raises(ValueError, match=fault):
        basis_of(metric, covariance)
