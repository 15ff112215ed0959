"""Scores of a whole prompt, for plans whose score of tokens waits for them: read again, or by a press of kvpress.

KVzip (arXiv 2505.23416, section 3): the prompt is read, and then again against itself, a chunk at a time, each after a
request to repeat it. What the model looks at to repeat a text is what it needs of it, whatever is asked later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..cache.mixed import MixedCache
from ..cache.policies import token_score
from ..cache.policies.presses import PressScore
from ..errors import PolicyError, class_and_sentence
from ..texts.tokens import encode

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Cache

    from ..models.loading import LoadedModel

CHUNK = 2048
"""Tokens that are read again at a time."""
LEAST = 64
"""Fewest of them that the model's limit must leave room for."""
REPEAT = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with"
OVERLAP = 8
"""Tokens before a chunk that the request to repeat it ends with."""
_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of these classes of a press that a model does not go with."""


def scores_prompts(cache: Cache) -> bool:
    """Return whether a cache's plan has a score of tokens that waits for the whole prompt."""
    policy = cache.plan.cache.tokens if isinstance(cache, MixedCache) else None
    return policy is not None and token_score(policy.score).waits


@contextmanager
def scoring(loaded: LoadedModel, cache: Cache, ids: Tensor, read: Callable[[Tensor], object]) -> Iterator[None]:
    """Let a prompt `[B, T]` be fed within this block; at its end score and pack it, if the plan's score waits for it.

    Args:
        read: feeds tokens `[B, S]` to the model through the cache.

    Raises:
        PolicyError: if the model's limit leaves no room to read the prompt again, a layer keeps a state that cannot be
            put back, or a press does not go with the model.
    """
    if not isinstance(cache, MixedCache) or not scores_prompts(cache):
        yield
        return
    score = token_score(cache.plan.cache.tokens.score) if cache.plan.cache.tokens else None
    if isinstance(score, PressScore):
        with _noted(loaded.model) as notes:
            yield
            _press(score.press, cache, notes)
    else:
        yield
        if cache.held:
            read_again(loaded, cache, ids, read)
    for each in cache.held:
        each.layer.release()


def read_again(loaded: LoadedModel, cache: MixedCache, ids: Tensor, read: Callable[[Tensor], object]) -> None:
    """Read a prompt `[B, T]` again against itself, without its sinks."""
    tokens = ids.shape[1]
    requests = [encode(loaded.tokenizer, text) for text in (REPEAT, REPEAT_FROM)]
    room = CHUNK if loaded.max_length is None else loaded.max_length - tokens - max(map(len, requests)) - OVERLAP
    size = min(CHUNK, room, tokens)
    if size < min(LEAST, tokens):
        raise PolicyError(
            f"the plan's score reads a prompt again after itself, and one of {tokens} tokens leaves room for {room} of "
            f"the model's {loaded.max_length}: shorten it, or use a score that reads a prompt once"
        )
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        request = torch.tensor(requests[min(start, 1)], dtype=ids.dtype, device=ids.device)
        before = ids[:, max(0, start - OVERLAP) : start]
        with cache.reading_again(part):
            read(torch.cat([request.expand(ids.shape[0], -1), before, ids[:, part]], dim=1))


@contextmanager
def _noted(model: nn.Module) -> Iterator[dict[int, tuple[nn.Module, Tensor, dict[str, Any]]]]:
    """Within this block note what each attention module is called with, by its layer: presses look at it.

    Some look at the rotary module as well, which they expect in every attention.
    """
    notes: dict[int, tuple[nn.Module, Tensor, dict[str, Any]]] = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Any = kwargs.get("hidden_states", args[0] if args else None)
        notes[module.layer_idx] = module, hidden, kwargs

    attentions = [module for module in model.modules() if _is_attention(module)]
    rotary = next((module.rotary_emb for module in model.modules() if hasattr(module, "rotary_emb")), None)
    without = [module for module in attentions if not hasattr(module, "rotary_emb")]
    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in attentions]
    try:
        for module in without:
            vars(module)["rotary_emb"] = rotary
        yield notes
    finally:
        for hook in hooks:
            hook.remove()
        for module in without:
            vars(module).pop("rotary_emb", None)


def _is_attention(module: nn.Module) -> bool:
    """Return whether a module is an attention that presses know: one layer's, with a projection of its own."""
    is_indexed = isinstance(getattr(module, "layer_idx", None), int)
    return is_indexed and (hasattr(module, "q_proj") or hasattr(module, "qkv_proj"))


def _press(press: Any, cache: MixedCache, notes: dict[int, tuple[nn.Module, Tensor, dict[str, Any]]]) -> None:
    """Let a press score the prompt of every layer that holds it."""
    name = type(press).__name__
    for each in cache.held:
        index, layer = each.index, each.layer
        if index not in notes or layer.held is None:
            raise PolicyError(f"layer {index}: the press {name} needs an attention with a q_proj, which is not there")
        module, hidden, kwargs = notes[index]
        keys, values = layer.prompt
        try:
            scores = press.score(module, hidden, keys, values, None, kwargs)
        except _FAULTS as error:
            raise PolicyError(f"layer {index}: the press {name} failed: {class_and_sentence(error)}") from error
        if scores.shape != keys.shape[:3] or not scores.isfinite().all():
            raise PolicyError(
                f"layer {index}: the press {name} gave {list(scores.shape)}; expected {list(keys.shape[:3])}, finite"
            )
        layer.held.scores = scores.detach().float()
