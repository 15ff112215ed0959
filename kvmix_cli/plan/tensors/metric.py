"""The loss's own metric of keys and values, and the basis in which half a squared error is an expected loss.

An error e in one packed key costs 1/2 e^T M e nats, to second order; M = E[g g^T] is the Fisher metric of one KV head.
With S the covariance of its keys and M = L L^T (Cholesky),

    L^T S L = U diag(l) U^T     z = encode (y - mean), encode = U^T L^T     y = mean + decode z, decode = L^-T U

the coordinates of z are uncorrelated, their variances are l, and an error of z costs half its square. A direction that
is left out costs l / 2 nats a predicted token: directions of all layers and heads, of keys and of values, compare.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
FLOOR = 1e-4
"""Share of a metric's norm (Frobenius, about its largest eigenvalue) that is added to every eigenvalue. Without it,
directions that calibration hardly saw would be free to be wrong."""
UNREAD = 1e-24
"""Metric, times the identity, of a head that nobody attends to: it has bits last, and its codes are as true as any. Far
below all others, but for those that have underflowed in a profile's float32 and are no longer without error."""
SMALL = 16
"""Triangles up to this size are inverted as any matrix is; larger ones by halves, at a sixth of the time for 128."""


class DirectionBasis(NamedTuple):
    """The bases of one layer's keys, or values, `D` directions in each of `H` KV heads.

    Attributes:
        encode, decode: `[H, D, D]`, inverse to each other; both are the identity where the metric is zero.
        eigenvalues: `[H, D]`, variances of the coordinates, falling; zeros where the metric is zero.
    """

    encode: Matrix
    decode: Matrix
    eigenvalues: Matrix


def spectrum(metric: ArrayLike, covariance: ArrayLike, floor: float = FLOOR, *, tokens: int | None = None) -> Matrix:
    """Return twice the loss that each direction carries, `[H, D]` nats a predicted token, falling."""
    return basis_of(metric, covariance, floor, tokens=tokens).eigenvalues


def basis_of(
    metric: ArrayLike, covariance: ArrayLike, floor: float = FLOOR, *, tokens: int | None = None
) -> DirectionBasis:
    """Return the bases of all heads.

    Args:
        metric: `[H, D, D]`, in nats a predicted token.
        covariance: `[H, D, D]`.
        floor: share of the metric's norm that is added to its eigenvalues.
        tokens: tokens that both were measured over. If there are fewer than directions (`needs_shrinkage`), both are
            drawn towards a multiple of the identity first.

    Raises:
        ValueError: if an entry is not finite, the shapes are no pair of `[H, D, D]`, or a metric has an eigenvalue that
            is below zero by more than the floor.
    """
    m, s = as_pair(metric, covariance)
    if tokens is not None and needs_shrinkage(tokens, m.shape[-1]):
        m, s = _shrunk(m, tokens), _shrunk(s, tokens)
    norms = np.linalg.norm(m, axis=(1, 2))
    diagonal = np.einsum("hii->hi", m)  # a view
    diagonal += (floor * norms + UNREAD)[:, None]
    try:
        lower = np.asarray(np.linalg.cholesky(m), np.float64)
    except np.linalg.LinAlgError as error:
        raise ValueError("expected a metric without negative eigenvalues") from error
    variances, directions = np.linalg.eigh(lower.transpose(0, 2, 1) @ s @ lower)
    variances, directions = np.maximum(variances[:, ::-1], 0.0), directions[:, :, ::-1].copy()  # BLAS goes forward
    encode, decode = (lower @ directions).transpose(0, 2, 1), _lower_inverse(lower).transpose(0, 2, 1) @ directions
    return DirectionBasis(encode, decode, variances)


def _lower_inverse(lower: Matrix) -> Matrix:
    """Return the inverses of lower triangles `[H, D, D]`."""
    half = lower.shape[-1] // 2
    if lower.shape[-1] <= SMALL:
        return np.asarray(np.linalg.inv(lower), np.float64)
    inverse = np.zeros_like(lower)
    inverse[:, :half, :half] = first = _lower_inverse(lower[:, :half, :half])
    inverse[:, half:, half:] = second = _lower_inverse(lower[:, half:, half:])
    inverse[:, half:, :half] = -second @ lower[:, half:, :half] @ first
    return inverse


def carrying(eigenvalues: ArrayLike, share: float) -> int:
    """Return the fewest directions that carry a share of the loss; none if there is no loss."""
    falling = np.sort(np.asarray(eigenvalues, np.float64), axis=None)[::-1]
    carried = np.cumsum(falling)
    return int(np.searchsorted(carried, share * carried[-1])) + 1 if carried[-1] > 0 else 0


def needs_shrinkage(tokens: int, directions: int) -> bool:
    """Return whether statistics over so few tokens cannot tell all directions apart."""
    return tokens < directions


def as_pair(metric: ArrayLike, covariance: ArrayLike) -> tuple[Matrix, Matrix]:
    """Return a metric and a covariance as symmetric matrices `[H, D, D]`, copies in float64.

    Raises:
        ValueError: if an entry is not finite, or the shapes are no pair of `[H, D, D]`.
    """
    m, s = _symmetric(metric), _symmetric(covariance)
    if m.shape != s.shape:
        raise ValueError(f"metric and covariance must have the same shape, got {list(m.shape)} and {list(s.shape)}")
    return m, s


def _symmetric(matrices: ArrayLike) -> Matrix:
    given = np.asarray(matrices)
    if given.ndim != 3 or given.shape[1] != given.shape[2]:
        raise ValueError(f"expected matrices [H, D, D], got {list(given.shape)}")
    if not np.isfinite(given).all():
        raise ValueError("expected finite statistics")
    half: Matrix = np.add(given, given.transpose(0, 2, 1), dtype=np.float64)
    half *= 0.5
    return half


def _shrunk(matrices: Matrix, tokens: int) -> Matrix:
    """Return matrices drawn towards the identity times their mean eigenvalue, by D parts to `tokens`."""
    directions = matrices.shape[-1]
    share = directions / (directions + tokens)
    level = np.trace(matrices, axis1=1, axis2=2) / directions
    shrunk: Matrix = (1 - share) * matrices + share * level[:, None, None] * np.eye(directions)
    return shrunk
