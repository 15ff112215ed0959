"""Known tokens fed to a model through a cache, and the loss of reading a document so."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from .prompt_scores import scoring

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel

    from ..models.loading import LoadedModel


def prefill(loaded: LoadedModel, cache: Cache, ids: Sequence[int] | Tensor) -> None:
    """Put a context, or several of the same length `[B, T]`, into an empty cache.

    The cache's count of attended tokens begins after it: if all are fed at once, its queries read no quantized token.
    """
    fill(loaded, cache, _batch(loaded, ids))
    reset_attended(cache)


def fill(loaded: LoadedModel, cache: Cache, ids: Tensor) -> Tensor:
    """Feed rows of a prompt `[B, T]` after the tokens that a cache holds; return the last logits `[B, vocabulary]`.

    A model with a `prefill_chunk` is fed so many tokens at a time: each chunk is packed as it comes, and the next one
    reads it so. All at once, the tokens see each other in full precision, and are in memory so, a layer at a time.
    Where the plan's score of tokens needs the whole prompt, it is scored before it is packed (`prompt_scores.py`).
    """
    with scoring(loaded, cache, ids, lambda part: last_logits(loaded, cache, part)):
        for part in ids.split(loaded.prefill_chunk or ids.shape[1], dim=1):
            logits = last_logits(loaded, cache, part)
    return logits


def feed(loaded: LoadedModel, cache: Cache, ids: Sequence[int], step: int) -> Iterator[tuple[slice, Tensor]]:
    """Feed tokens `step` at a time; inside a step they see each other in full precision.

    Yields:
        The slice of `ids` that was fed, and its logits, float32 `[tokens, vocabulary]`.
    """
    for start in range(0, len(ids), step):
        part = slice(start, min(start + step, len(ids)))
        yield part, _logits(loaded, cache, _batch(loaded, ids[part]))[0].float()


@torch.inference_mode()
def document_loss(loaded: LoadedModel, cache: Cache, ids: Sequence[int], prefix: int, step: int) -> float:
    """Return the negative log-likelihood (nats, summed) of a document that is read back through an empty cache.

    The first `prefix` tokens are prefilled, the rest is fed `step` at a time. Every scored token is predicted by a
    query that went through the cache, so `len(ids) - prefix - 1` tokens count.

    Raises:
        TextError: if the embedding does not have one of the ids.
    """
    loaded.check_ids([ids])
    prefill(loaded, cache, ids[:prefix])
    targets, loss = ids[prefix + 1 :], 0.0
    for part, logits in feed(loaded, cache, ids[prefix:-1], step):
        wanted = torch.tensor(targets[part], device=logits.device)
        loss += cross_entropy(logits, wanted, reduction="sum").item()
    return loss


def last_logits(loaded: LoadedModel, cache: Cache, ids: Tensor) -> Tensor:
    """Feed ids `[B, T]` and return the logits of each row's last one, `[B, vocabulary]`."""
    options = {"logits_to_keep": 1} if _accepts_keep(type(loaded.model).forward) else {}
    return _logits(loaded, cache, ids, **options)[:, -1]


def reset_attended(cache: Cache) -> None:
    """Begin to count anew what attention reads, in a cache that counts it."""
    if (attended := getattr(cache, "attended", None)) is not None:
        attended.reset()


@functools.cache
def _accepts_keep(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters


def _batch(loaded: LoadedModel, ids: Sequence[int] | Tensor) -> Tensor:
    return ids if isinstance(ids, torch.Tensor) else torch.tensor([list(ids)], device=loaded.device)


def _logits(loaded: LoadedModel, cache: Cache, ids: Tensor, **options: Any) -> Tensor:
    """Return logits `[B, tokens, vocabulary]`."""
    if cache.get_seq_length() == 0:
        _forget_positions(loaded.model)
    logits: Tensor = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits
    return logits


def _forget_positions(model: PreTrainedModel) -> None:
    """Make a model with positions in three dimensions forget by how much an earlier answer's image shifted them.

    It keeps the shift of every row of the last generation, and would apply it to other rows of another text.
    """
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
