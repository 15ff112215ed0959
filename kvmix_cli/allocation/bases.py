"""Bases of transform codes, made from the moments that a profile has measured."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..errors import BudgetError
from ..plan.basis import TENSOR_NAMES, BasisFile, Floats, LayerBasis, TensorName
from ..plan.metric import basis_of
from ..plan.moments import LayerMoments, TensorMoments
from ..profile import Profile

SCORE = "fisher-metric"
"""The score whose moments bases are made from."""
SMALLEST_DEVIATION = 1e-8
"""Of a direction that no token of the calibration text differs in; no direction has less, so that all can be coded."""


def make_bases(profile: Profile, moments: Mapping[int, LayerMoments]) -> BasisFile:
    """Return the directions of all layers.

    Args:
        profile: the profile that `moments` belong to.
        moments: of every layer, from `plan.moments.read_moments`.

    Raises:
        BudgetError: if the moments of a layer are missing, or not finite.
    """
    record = profile.score(SCORE).moments
    tokens = None if record is None else record.tokens

    def made(index: int) -> dict[TensorName, LayerBasis]:
        if index not in moments:
            raise BudgetError(f"the moments have no layer {index}; measure them again with --score {SCORE}")
        try:
            return {name: _basis(getattr(moments[index], name), tokens) for name in TENSOR_NAMES}
        except ValueError as error:
            raise BudgetError(f"layer {index} has no basis: {error}; measure it again with --score {SCORE}") from error

    with ThreadPoolExecutor() as pool:  # numpy leaves the interpreter to others while it finds eigenvectors
        layers = dict(zip(profile.model.quantizable, pool.map(made, profile.model.quantizable), strict=True))
    rope = {index: each.rope for index, each in moments.items() if each.rope is not None}
    frame = record.frame if record is not None and rope else None
    return BasisFile(profile.model.id, layers, frame, rope)


def _basis(moments: TensorMoments, tokens: int | None) -> LayerBasis:
    encode, decode, variances = basis_of(moments.metric, moments.covariance, tokens=tokens)
    deviation = np.sqrt(np.maximum(variances, SMALLEST_DEVIATION**2))
    return LayerBasis(*map(_floats, (encode, decode, moments.mean, deviation)))


def _floats(array: NDArray[np.float64]) -> Floats:
    return np.ascontiguousarray(array, np.float32)
