"""Codebooks of all layers, by weighted k-means over the tokens that a profile has kept (CQ, arXiv 2405.03917)."""

from __future__ import annotations

from kvmix_kernels.layout import Kind
from torch import Tensor

from ..codecs.clustering import clustered
from ..codecs.vectors import LEARNED_BITS, SPANS
from ..plan.tensors.basis import TensorName
from ..plan.tensors.codebooks import Books, Codebooks
from .moments import MomentSums

MOST_TOKENS = 4096
"""Most tokens that a codebook is learned from: every second, or third, of more that were kept."""


def learn_codebooks(sums: MomentSums, model: str) -> tuple[Codebooks, int]:
    """Return codebooks of every width for each layer, KV head and group of channels, and the tokens behind them.

    A vector of neighbouring channels counts by the sum of its squared gradients, `g^T g` (section 3.3).

    Args:
        sums: of all documents, with tokens that were kept.
        model: id of the model.
    """
    kinds: dict[TensorName, Kind] = {"k": "key", "v": "value"}
    layers = {index: {name: _books(sums, index, kind) for name, kind in kinds.items()} for index in sums.ropes}
    tokens = _chosen(sums, min(sums.ropes), "key")[0].shape[1]
    rope = {index: each for index, each in sums.ropes.items() if each is not None}
    return Codebooks(model, layers, rope), tokens


def _books(sums: MomentSums, index: int, kind: Kind) -> dict[int, Books]:
    """Return the codebooks of a layer's keys or values by width; none of a width whose vectors do not divide a head."""
    states, squares = _chosen(sums, index, kind)
    found: dict[int, Books] = {}
    for bits in LEARNED_BITS:
        span, heads = SPANS[bits], len(states)
        if states.shape[2] % span:
            continue
        vectors, weights = (each.unflatten(2, (-1, span)).transpose(1, 2).flatten(0, 1) for each in (states, squares))
        books = clustered(vectors.contiguous(), weights.sum(-1), 1 << bits * span)
        found[bits] = books.unflatten(0, (heads, -1)).half().numpy()
    return found


def _chosen(sums: MomentSums, index: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return keys or values `[H, n, D]` to learn from, and the squares of their gradients."""
    states, squares = sums.kept(index, kind)
    step = -(-states.shape[1] // MOST_TOKENS)
    return states[:, ::step], squares[:, ::step]
