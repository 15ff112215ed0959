"""Bytes of a cache at the end of a generation, beside those of an unquantized one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cache.mixed import MixedCache
from ..cache.sizes import cache_nbytes

if TYPE_CHECKING:
    from transformers import Cache

    from ..models.loading import LoadedModel
    from ..plan import Plan

BF16_BYTES = 2


@dataclass(frozen=True)
class Footprint:
    """Bytes of a cache, and the share of attention that read quantized tokens.

    Attributes:
        unquantized_bytes: bytes of the stock cache in the model's dtype.
        bf16_bytes: the same at 16 bits; compression is against this, also where a float32 model's own cache is bigger.
        quantized_share: share of the (query, cached token) pairs that were quantized.
    """

    bytes: int
    unquantized_bytes: int
    bf16_bytes: int
    quantized_share: float

    @property
    def compression(self) -> float:
        """Return how many times smaller the cache is than one of 16 bits."""
        return self.bf16_bytes / self.bytes

    @property
    def compression_same_dtype(self) -> float:
        """Return how many times smaller the cache is than the unquantized one in the model's dtype."""
        return self.unquantized_bytes / self.bytes


def measure_footprint(cache: Cache, plan: Plan | None, element_bytes: int) -> Footprint:
    """Return the footprint of a filled cache.

    Args:
        plan: the cache's plan; None for a cache without one.
        element_bytes: bytes of an unquantized element.
    """
    total = unquantized = cache_nbytes(cache)
    if plan is not None:
        planned = sum(cache.layers[index].nbytes for index in plan.layers)
        tokens = max((cache.layers[index].get_seq_length() for index in plan.layers), default=0)
        unquantized += plan.unquantized_bytes(tokens, element_bytes=element_bytes) - planned
    share = cache.attended.share if isinstance(cache, MixedCache) else 0.0
    return Footprint(total, unquantized, unquantized * BF16_BYTES // element_bytes, share)


@dataclass(frozen=True)
class FullContext:
    """Bytes of the planned layers at the longest context that a model takes, in the model's dtype."""

    tokens: int
    cache_bytes: int
    unquantized_bytes: int

    @property
    def compression(self) -> float:
        """Return how many times smaller the cache is than the unquantized one."""
        return self.unquantized_bytes / self.cache_bytes


def full_context(plan: Plan | None, loaded: LoadedModel) -> FullContext | None:
    """Return the bytes of a plan at the model's longest context; None without a plan or without a limit."""
    if plan is None or loaded.max_length is None or not plan.layers:
        return None
    size = loaded.model.dtype.itemsize
    packed = plan.cache_bytes(loaded.max_length, element_bytes=size).total
    return FullContext(loaded.max_length, packed, plan.unquantized_bytes(loaded.max_length, element_bytes=size))
