"""Measured divergence of each width: documents are read back through the cache, one layer's keys, or values, quantized.

    KL(p || q) = sum p (log p - log q)        p: next-token distribution with nothing quantized, q: with one tensor

in nats a token: the increase of the loss on text that is as the model expects it. It is never negative and varies
little between texts, so it tells apart choices whose `loss` drowns in noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import Cache

from ...cache.mixed import unquantized_cache
from ...decoding.feed import feed, prefill
from ...models.loading import LoadedModel
from ..grid import Grid
from ..probe import CacheProbe


class Kl(CacheProbe):
    """Measured divergence of the predictions."""

    name = "kl"
    unit = "nats"

    def prepared(self, loaded: LoadedModel, ids: Sequence[int], grid: Grid) -> Callable[[Cache], float]:
        prefix = grid.shortest - 2

        def predictions(cache: Cache) -> Iterator[Tensor]:
            prefill(loaded, cache, ids[:prefix])
            for _, logits in feed(loaded, cache, ids[prefix:-1], grid.cache.page):
                yield logits.log_softmax(-1)

        @torch.inference_mode()
        def divergence(cache: Cache) -> float:
            pairs = zip(full, predictions(cache), strict=True)
            return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean().item()

        with torch.inference_mode():
            full = list(predictions(unquantized_cache(loaded.model.config)))
        return divergence
