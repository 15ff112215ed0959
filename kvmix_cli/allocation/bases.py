"""Bases of transform codes, made from the moments that a profile has measured."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ..errors import BudgetError
from ..plan.tensors.basis import TENSOR_NAMES, BasisFile, Floats, LayerBasis, TensorName
from ..plan.tensors.directions import Directions, basis_along
from ..plan.tensors.metric import UNREAD
from ..plan.tensors.moments import LayerMoments
from ..profile import Profile

SCORE = "fisher-metric"
"""The score whose moments bases are made from."""
SMALLEST_DEVIATION = 1e-6
"""Of a direction that no token of the calibration text differs in, as a share of the head's largest; no direction has
less, so that all can be coded. A share, since those of a head that hardly anybody attends to are small altogether."""


def make_bases(profile: Profile, moments: Mapping[int, LayerMoments], directions: Directions = "loss") -> BasisFile:
    """Return the directions of all layers.

    Args:
        profile: the profile that `moments` belong to.
        moments: of every layer, from `plan.tensors.moments.read_moments`.
        directions: where they come from.

    Raises:
        BudgetError: if the moments of a layer are missing, or not finite.
    """
    record = profile.score(SCORE).moments
    tokens = None if record is None else record.tokens

    def made(index: int) -> dict[TensorName, LayerBasis]:
        if index not in moments:
            raise BudgetError(f"the moments have no layer {index}; measure them again with --score {SCORE}")
        try:
            return {name: _basis(moments[index], name, directions, tokens) for name in TENSOR_NAMES}
        except ValueError as error:
            raise BudgetError(f"layer {index} has no basis: {error}; measure it again with --score {SCORE}") from error

    # numpy leaves the interpreter to others while it finds eigenvectors; further threads for each small product would
    # spend minutes waiting for one another where other processes use the cores
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor() as pool:
        layers = dict(zip(profile.model.quantizable, pool.map(made, profile.model.quantizable), strict=True))
    rope = {index: each.rope for index, each in moments.items() if each.rope is not None}
    frame = record.frame if record is not None and rope else None
    return BasisFile(profile.model.id, layers, frame, rope)


def _basis(layer: LayerMoments, name: TensorName, directions: Directions, tokens: int | None) -> LayerBasis:
    own = layer.k if name == "k" else layer.v
    pairs = layer.rope.pairs if name == "k" and layer.rope is not None else None
    found = basis_along(directions, own.metric, own.covariance, tokens=tokens, pairs=pairs)
    largest = found.eigenvalues.max(-1, keepdims=True)
    smallest = np.where(largest > 0, SMALLEST_DEVIATION**2 * largest, UNREAD)
    deviation = np.sqrt(np.maximum(found.eigenvalues, smallest))
    return LayerBasis(*map(_floats, (found.encode, found.decode, own.mean, deviation)))


def _floats(array: NDArray[np.float64]) -> Floats:
    return np.ascontiguousarray(array, np.float32)
