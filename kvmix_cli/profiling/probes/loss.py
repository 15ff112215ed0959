"""Measured loss of each width: documents are read back through the cache, one layer's keys, or values, quantized.

    loss(one tensor at b bits) - loss(nothing quantized)        in nats a token

Exact, but it costs a forward pass a choice and tensor, and a difference of losses on a few documents is noisy: on
builtin:tiny most of 30 samples' means are within two standard errors of zero. `kl` costs the same and is not noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import Cache

from ...cache.mixed import unquantized_cache
from ...decoding.feed import document_loss
from ...models.loading import LoadedModel
from ..grid import Grid
from ..probe import CacheProbe


class Loss(CacheProbe):
    """Measured increase of the loss."""

    name = "loss"
    unit = "nats"

    def prepared(self, loaded: LoadedModel, ids: Sequence[int], grid: Grid) -> Callable[[Cache], float]:
        prefix, step = grid.shortest - 2, grid.cache.page
        scored = len(ids) - prefix - 1
        full = document_loss(loaded, unquantized_cache(loaded.model.config), ids, prefix, step)
        return lambda cache: (document_loss(loaded, cache, ids, prefix, step) - full) / scored
