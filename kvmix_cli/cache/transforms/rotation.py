"""Rotation: keys and values are stored in another orthonormal basis, in which no channel is much larger."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ...errors import PlanError
from .arrays import FileTensor
from .base import Transform

ORTHOGONAL = 1e-2
"""Largest `max |R R^T - 1|` of a matrix that counts as orthogonal; in 16 bits, rounding alone reaches half of it."""


class Rotation(Transform):
    """An orthogonal matrix `R`: `k R` is stored, and `q R . k R = q . k`; of values, `R^T` turns the output back.

    QuaRot (arXiv 2404.00456) rotates keys and queries after RoPE and by head, as here, with a Hadamard matrix. It
    folds the rotation of values into the weights, where it costs nothing; we change no weights. RotateKV (arXiv
    2501.16383) reorders channels first, and rotates heads together and before RoPE; we do not.

    Args:
        matrix: `[D, D]`, float32 or float64.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    @property
    def constant(self) -> Tensor:
        """Return the matrix."""
        return self._matrix

    def fit(self, states: Tensor, query: Tensor | None) -> None:
        """Do nothing: there is nothing to learn."""

    def store(self, states: Tensor) -> Tensor:
        """Return the states in the other basis."""
        return self._times(states, self._matrix)

    def restore(self, stored: Tensor) -> Tensor:
        """Return the inverse of `store`."""
        return self._times(stored, self._matrix.T)

    def query(self, query: Tensor) -> Tensor:
        """Return the queries in the other basis."""
        return self._times(query, self._matrix)

    def output(self, output: Tensor) -> Tensor:
        """Return the output in the model's own basis."""
        return self._times(output, self._matrix.T)

    @staticmethod
    def _times(given: Tensor, matrix: Tensor) -> Tensor:
        return (given.to(matrix.dtype) @ matrix).to(given.dtype)


@lru_cache(maxsize=32)
def hadamard(size: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return an orthogonal matrix `[size, size]`, `size = 2^k m`, whose entries are at most `sqrt(2 / size)`.

    Random signs, then the Sylvester matrix of `2^k` Kronecker the Hartley matrix of the odd `m`. Hadamard matrices of
    odd sizes do not exist; the Hartley matrix `cas(2 pi i j / m) / sqrt(m)`, `cas = cos + sin`, is orthogonal, and
    flat but for a factor of `sqrt(2)`. For a power of two every entry is `+-1 / sqrt(size)`. Signs come first
    (`diag(s) H` with rows as vectors, as in the randomized Hadamard transform of QuIP#, arXiv 2402.04396): without them
    a mean common to all channels would end up in one. The matrix is shared between layers.
    """
    with torch.inference_mode(False):
        return (_signs(size, seed)[:, None] * _flat(size)).to(device, dtype)


@lru_cache(maxsize=32)
def sylvester(size: int, device: torch.device) -> Tensor:
    """Return the symmetric Hadamard matrix `[size, size]` of a power of two, without signs, orthonormal, float32."""
    with torch.inference_mode(False):
        return _flat(size).to(device, torch.float32)


@lru_cache(maxsize=512)
def loaded(stored: FileTensor, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the orthogonal matrix `[size, size]` nearest to one from a file. The matrix is shared between layers.

    A matrix in 16 bits is orthogonal only up to their rounding; `U V^T` of its singular vectors is exact up to ours.

    Raises:
        PlanError: if it has another shape, is not finite, or not orthogonal.
    """
    with torch.inference_mode(False):
        matrix = stored.numbers((size, size))
        off = (matrix @ matrix.T - torch.eye(size, dtype=matrix.dtype, device="cpu")).abs().max().item()
        if off > ORTHOGONAL:
            raise PlanError(
                f"{stored} is not orthogonal: R R^T differs from the identity by up to {off:.3g}, and "
                f"{ORTHOGONAL:g} is allowed; give an orthogonal matrix, or none for a Hadamard matrix"
            )
        left, _, right = torch.linalg.svd(matrix)
        nearest: Tensor = left @ right
        return nearest.to(device, dtype)


def _flat(size: int) -> Tensor:
    """Return `hadamard` without its signs, float64."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    matrix = _hartley(odd)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu") / math.sqrt(2)
    for _ in range((size // odd).bit_length() - 1):
        matrix = torch.kron(step, matrix)
    return matrix


def _hartley(size: int) -> Tensor:
    """Return the Hartley matrix `[size, size]`, orthogonal and symmetric."""
    index = torch.arange(size, device="cpu")
    angles = (index[:, None] * index % size).double() * (2 * math.pi / size)
    matrix: Tensor = (angles.cos() + angles.sin()) / math.sqrt(size)
    return matrix


def _signs(size: int, seed: int) -> Tensor:
    """Return `[size]` random signs, drawn on the CPU, where a seed gives the same everywhere."""
    generator = torch.Generator(device="cpu").manual_seed(seed % 2**63)
    return torch.randint(2, (size,), generator=generator, device="cpu").double() * 2 - 1
