"""Directions that other methods code keys and values in, weighted by the loss's own metric.

With A an orthonormal basis of one KV head, such as the principal components of its keys, and w the metric along each,

    w = diag(A^T M A)       z = encode (y - mean), encode = diag(w)^1/2 A^T       y = mean + decode z

half the squared error of z is the expected loss if errors of different directions have nothing to do with each other.
So these directions compare with each other, and with those of the metric (`metric`), whose coordinates are also
uncorrelated.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .metric import FLOOR, UNREAD, DirectionBasis, as_pair, basis_of

Directions = Literal["loss", "variance", "channels"]
"""Where directions come from: metric and covariance together, the covariance alone, or the channels as they are."""


def basis_along(
    directions: Directions,
    metric: ArrayLike,
    covariance: ArrayLike,
    *,
    tokens: int | None = None,
    pairs: NDArray[np.intp] | None = None,
) -> DirectionBasis:
    """Return the bases of all heads in directions of some origin, the most costly of each head first.

    Args:
        directions: their origin; `loss` is `metric.basis_of`.
        metric: `[H, D, D]`, in nats a predicted token. Along a direction it is at least `FLOOR` of the largest.
        covariance: `[H, D, D]`.
        tokens: tokens that both were measured over, see `metric.basis_of`; for `loss`.
        pairs: two channels a row, `[P, 2]`, that RoPE turns into each other. As `channels` they count as one: both have
            the mean of their metric and of their variance.

    Raises:
        ValueError: if an entry is not finite, or the shapes are no pair of `[H, D, D]`.
    """
    if directions == "loss":
        return basis_of(metric, covariance, tokens=tokens)
    m, s = as_pair(metric, covariance)
    axes = np.linalg.eigh(s)[1] if directions == "variance" else np.broadcast_to(np.eye(m.shape[-1]), m.shape)
    weights, variances = ((axes * (each @ axes)).sum(1) for each in (m, s))
    if directions == "channels" and pairs is not None:
        for each in (weights, variances):
            each[:, pairs] = each[:, pairs].mean(-1, keepdims=True)
    largest = weights.max(-1, keepdims=True)
    weights = np.maximum(weights, FLOOR * largest + UNREAD)
    variances = np.maximum(weights * variances, 0.0)
    order = np.argsort(-variances, axis=-1, kind="stable")
    weights, variances = (np.take_along_axis(each, order, -1) for each in (weights, variances))
    axes, sizes = np.take_along_axis(axes, order[:, None], -1), np.sqrt(weights)
    return DirectionBasis(sizes[:, :, None] * axes.transpose(0, 2, 1), axes / sizes[:, None], variances)
