"""Weighted k-means of many small clouds of points at once, for codebooks that are learned."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

STEPS: Final = 10
"""Times that every entry moves to the mean of its vectors."""
AT_ONCE: Final = 2**20
"""Distances that are held together; few, so that they stay in a processor's cache."""


def clustered(vectors: Tensor, weights: Tensor, entries: int, seed: int = 0) -> Tensor:
    """Return codebooks `[G, entries, span]` of small weighted squared error, one of each cloud.

    Lloyd's algorithm, begun with vectors drawn by their weights.

    Args:
        vectors: `[G, n, span]`.
        weights: `[G, n]`, not negative; what the squared error of each vector counts.
        entries: of each codebook.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    chances = weights.double().clamp(min=torch.finfo(torch.float32).tiny)
    first = torch.multinomial(chances, entries, replacement=entries > vectors.shape[1], generator=generator)
    return refined(vectors, weights, vectors.gather(1, _spread(first, vectors)))


def refined(vectors: Tensor, weights: Tensor, books: Tensor) -> Tensor:
    """Return codebooks `[G, entries, span]` after Lloyd's algorithm from others; an entry without vectors stays."""
    for _ in range(STEPS):
        codes = nearest(vectors, books)
        totals = weights.new_zeros(books.shape[:2]).scatter_add_(1, codes, weights)
        sums = torch.zeros_like(books).scatter_add_(1, _spread(codes, vectors), vectors * weights[..., None])
        means = sums / totals.clamp(min=torch.finfo(totals.dtype).tiny)[..., None]
        books = torch.where((totals > 0)[..., None], means, books)
    return books


def nearest(vectors: Tensor, books: Tensor) -> Tensor:
    """Return the nearest entries `[G, n]` of codebooks `[G, entries, span]` for vectors `[G, n, span]`."""
    halves = books.square().sum(-1)[:, None] / 2
    rows = max(1, AT_ONCE // (books.shape[0] * books.shape[1]))
    parts = [torch.baddbmm(halves, some, books.mT, alpha=-1).argmin(-1) for some in vectors.split(rows, dim=1)]
    return torch.cat(parts, dim=1)


def _spread(places: Tensor, vectors: Tensor) -> Tensor:
    """Return places `[G, n]` for each number of the vectors there, `[G, n, span]`."""
    return places[..., None].expand(*places.shape, vectors.shape[2])
