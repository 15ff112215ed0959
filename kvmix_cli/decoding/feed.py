"""Feeding known tokens to a model through a cache, and the loss of reading them so."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

    from ..models.loading import LoadedModel


def prefill(loaded: LoadedModel, cache: Cache, ids: Sequence[int] | Tensor) -> None:
    """Put a context, or several of the same length `[B, T]`, into an empty cache.

    It counts for nothing: its queries have read no quantized token.
    """
    _forward(loaded, cache, ids, keep=1)
    if (attended := getattr(cache, "attended", None)) is not None:
        attended.reset()


def feed(loaded: LoadedModel, cache: Cache, ids: Sequence[int], step: int) -> Iterator[tuple[slice, Tensor]]:
    """Feed tokens `step` at a time; inside a step they see each other in full precision.

    Yields:
        Which of `ids` were fed, and their logits, float32 `[tokens, vocabulary]`.
    """
    for start in range(0, len(ids), step):
        part = slice(start, min(start + step, len(ids)))
        yield part, _forward(loaded, cache, ids[part]).float()


@torch.inference_mode()
def document_loss(loaded: LoadedModel, cache: Cache, ids: Sequence[int], prefix: int, step: int) -> float:
    """Negative log-likelihood (nats, summed) of a document that is read back through an empty cache.

    The first `prefix` tokens are prefilled, the rest is fed `step` at a time. Every scored token is predicted by a
    query that went through the cache, so `len(ids) - prefix - 1` tokens count.
    """
    prefill(loaded, cache, ids[:prefix])
    targets, loss = ids[prefix + 1 :], 0.0
    for part, logits in feed(loaded, cache, ids[prefix:-1], step):
        wanted = torch.tensor(targets[part], device=logits.device)
        loss += cross_entropy(logits, wanted, reduction="sum").item()
    return loss


def _forward(loaded: LoadedModel, cache: Cache, ids: Sequence[int] | Tensor, keep: int | None = None) -> Tensor:
    """Logits `[tokens, vocabulary]` of the first row, of the last `keep` tokens only where the model can do so."""
    options: dict[str, Any] = {}
    if keep is not None and "logits_to_keep" in inspect.signature(loaded.model.forward).parameters:
        options["logits_to_keep"] = keep
    inputs = ids if isinstance(ids, torch.Tensor) else torch.tensor([list(ids)], device=loaded.device)
    logits: Tensor = loaded.model(input_ids=inputs, past_key_values=cache, use_cache=True, **options).logits[0]
    return logits
