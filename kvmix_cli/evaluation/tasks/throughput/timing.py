"""One generation, timed: the prompt and the decoding apart."""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ....cache.sizes import cache_nbytes
from ....cache.subject import attended
from ....models.memory import devices, synchronize, watch
from ....quiet import hushed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel

    from ....cache.subject import Subject
    from ....models.loading import LoadedModel

PLAIN_ATTENTION = "sdpa"
"""What everybody uses. Our attention is faster on a CPU for plain caches as well, so it would not be the baseline."""


@dataclass(frozen=True)
class Timing:
    """What a generation took.

    Attributes:
        prompt_seconds: from an empty cache until the first token of every row is there.
        decode_seconds: of the other tokens.
        cache_bytes: at the end.
        peak_bytes: the most that it took above the model; None where that cannot be measured.
        attention: the implementation that ran.
        attended: what decoding has read, see `feeding.attended`.
    """

    prompt_seconds: float
    decode_seconds: float
    cache_bytes: int
    peak_bytes: int | None
    attention: str
    attended: dict[str, float]

    @property
    def bytes(self) -> int:
        """That it took above the model, as far as can be measured: at its peak, or else of the cache."""
        return max(self.cache_bytes, self.peak_bytes or 0)


def generate(loaded: LoadedModel, subject: Subject, ids: Tensor, new_tokens: int) -> Timing:
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
    """Within this block Python does not look for garbage, which takes half a second at times of its own choosing."""
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
    """The cache, and when the work began, when the first token was there, and the last."""

    def now() -> float:
        synchronize(on)
        return time.perf_counter()

    options = _last_logits_only(loaded.model)
    ids = ids.to(loaded.device)
    start = now()
    cache = subject.cache(loaded.config, reserve=ids.shape[1] + new_tokens)
    token = _next(loaded.model, cache, ids, options)
    first = now()
    if (counted := getattr(cache, "attended", None)) is not None:
        counted.reset()
    for _ in range(new_tokens - 1):
        token = _next(loaded.model, cache, token, options)
    return cache, (start, first, now())


def _next(model: PreTrainedModel, cache: Cache, ids: Tensor, options: dict[str, Any]) -> Tensor:
    """The likeliest next token of every row, `[B, 1]`."""
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits
    return logits[:, -1:].argmax(-1)


def _last_logits_only(model: PreTrainedModel) -> dict[str, Any]:
    """As `generate` asks for it, where the model can leave out the logits of the rest of the prompt."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@contextmanager
def _attention(model: PreTrainedModel, name: str | None) -> Iterator[str]:
    """Within this block another attention implementation, if the model takes it; None for the one it has."""
    before = model.config._attn_implementation
    try:
        _set(model, name or before)
        yield model.config._attn_implementation
    finally:
        _set(model, before)


def _set(model: PreTrainedModel, name: str) -> None:
    with hushed(), suppress(ValueError):
        model.set_attn_implementation(name)
