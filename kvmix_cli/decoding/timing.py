"""One generation of a batch, timed: the prompt and the decoding apart."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..cache.sizes import cache_nbytes
from ..cache.subject import AttendedPairs, attended
from ..models.memory import devices, synchronize, watch
from ..quiet import hushed
from .feed import fill, last_logits, reset_attended

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel

    from ..cache.subject import Subject
    from ..models.loading import LoadedModel

PLAIN_ATTENTION = "sdpa"
"""Attention of caches that are not ours. On a CPU ours is faster for plain caches too, so it would be no baseline."""


@dataclass(frozen=True)
class Timing:
    """Time and memory of one generation.

    Attributes:
        prompt_seconds: from an empty cache until the first token of every row is there.
        decode_seconds: of the other tokens.
        cache_bytes: at the end.
        peak_bytes: the most that was taken above the model; None where that cannot be measured.
        attention: the implementation that ran.
        attended: tokens that decoding has read, see `cache.subject.attended`.
    """

    prompt_seconds: float
    decode_seconds: float
    cache_bytes: int
    peak_bytes: int | None
    attention: str
    attended: AttendedPairs

    @property
    def bytes(self) -> int:
        """Return the bytes taken above the model: at the peak where that was measured, else by the cache."""
        return max(self.cache_bytes, self.peak_bytes or 0)


def time_generation(loaded: LoadedModel, subject: Subject, ids: Tensor, new_tokens: int) -> Timing:
    """Prefill `[B, T]` ids and decode greedily, one forward a token, until every row has `new_tokens` of them.

    A plan's cache runs under the attention that the model was loaded with, every other one under SDPA.
    """
    on = devices(loaded.model)
    named = _attention(loaded.model, None if subject.plan else PLAIN_ATTENTION)
    with named as attention, watch(on) as peak, _no_collection():
        cache, times = _run(loaded, subject, ids, new_tokens, on)
    start, first, last = times
    return Timing(first - start, last - first, cache_nbytes(cache), peak.bytes, attention, attended(cache))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collection, which takes up to half a second, out of this block."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@torch.inference_mode()
def _run(
    loaded: LoadedModel, subject: Subject, ids: Tensor, new_tokens: int, on: set[torch.device]
) -> tuple[Cache, Sequence[float]]:
    """Return the cache, and the times when the work began and when the first and the last token were there."""

    def now() -> float:
        synchronize(on)
        return time.perf_counter()

    ids = ids.to(loaded.device)
    start = now()
    cache = subject.cache(loaded.config, reserve=ids.shape[1] + new_tokens)
    token = fill(loaded, cache, ids).argmax(-1, keepdim=True)
    first = now()
    reset_attended(cache)
    for _ in range(new_tokens - 1):
        token = last_logits(loaded, cache, token).argmax(-1, keepdim=True)
    return cache, (start, first, now())


@contextmanager
def _attention(model: PreTrainedModel, name: str | None) -> Iterator[str]:
    """Switch to another attention implementation within this block, if the model accepts it; None keeps its own."""
    before = model.config._attn_implementation
    try:
        _set(model, name or before)
        yield model.config._attn_implementation
    finally:
        _set(model, before)


def _set(model: PreTrainedModel, name: str) -> None:
    with hushed(), suppress(ValueError):
        model.set_attn_implementation(name)
