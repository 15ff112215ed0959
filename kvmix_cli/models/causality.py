"""Trial forwards of a few tokens: what a model's class promises is seen before anything is measured with it.

A class may be listed as a causal language model and yet attend to later tokens, ignore the cache it is given, or need
inputs that text alone does not give. And a class that takes any attention implementation may rely on what its own does
with its mask. Both are found by feeding two rows that differ in their last token only: what is predicted before that
token must be equal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..errors import ModelError, first_sentence, is_out_of_memory
from ..plan import ModelInfo

TOKENS = 3
TOLERANCE = 1e-3
"""Relative to the largest logit. Rows of one product differ by rounding; a token that is seen too early changes them
much more, as the two last tokens have nothing in common."""
LIBRARY_ERRORS = (
    AssertionError,
    AttributeError,
    ArithmeticError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that a model's code raises for inputs that it does not take."""


def check_causal(model: PreTrainedModel, model_id: str, info: ModelInfo | None = None) -> Tensor:
    """Return the logits of `trial_logits` with transformers' own cache.

    Raises:
        ModelError: unless the model reads text alone, fills transformers' cache, and sees no later token; with `info`
            also if it caches other KV heads than its configuration tells.
    """
    try:
        cache = DynamicCache(config=model.config)
        logits = trial_logits(model, cache)
        filled = cache.get_seq_length() == 2 * TOKENS
    except LIBRARY_ERRORS as error:
        if is_out_of_memory(error):
            raise ModelError(f"no memory to run {TOKENS} tokens through {model_id}: use a smaller model") from error
        raise ModelError(
            f"{type(model).__name__} of {model_id} does not run with transformers' key-value cache: "
            f"{first_sentence(error)}"
        ) from error
    if not filled:
        raise ModelError(
            f"{type(model).__name__} of {model_id} does not keep its keys and values in transformers' cache, "
            "so there is nothing to quantize"
        )
    if info is not None:
        _check_heads(cache, info)
    if not sees_no_later_token(logits):
        raise ModelError(
            f"{type(model).__name__} of {model_id} attends to later tokens, as an encoder does: "
            "kvmix takes decoder-only language models"
        )
    return logits


def _check_heads(cache: DynamicCache, info: ModelInfo) -> None:
    for index in info.quantizable:
        keys, values = cache.layers[index].keys, cache.layers[index].values
        heads = info.heads(index)
        if keys is None or values is None:
            raise ModelError(
                f"layer {index} of {info.id} does not keep its keys and values in transformers' cache, "
                "so there is nothing to quantize"
            )
        cached = keys.shape[1], keys.shape[3], values.shape[3]
        if cached != (heads.kv_heads, heads.key_dim, heads.value_dim):
            found = f"{keys.shape[1]} x {keys.shape[3]} (values {values.shape[3]})"
            raise ModelError(
                f"layer {index} of {info.id} caches heads of {found}, and its configuration tells of {heads}: "
                "kvmix cannot plan for it"
            )


def trial_logits(model: PreTrainedModel, cache: Cache) -> Tensor:
    """Return the logits `[2, 2 T, vocabulary]` of two rows that differ in their last token, fed twice to a cache.

    The second time several tokens are read back at once, as an evaluation does.
    """
    return torch.cat([_forward(model, past_key_values=cache, use_cache=True) for _ in range(2)], dim=1)


@torch.inference_mode()
def _forward(model: PreTrainedModel, **options: object) -> Tensor:
    """Return the logits `[2, T, vocabulary]` of two rows that differ in their last token only."""
    weight = model.get_input_embeddings().weight
    last = weight.shape[0] - 1
    ids = torch.tensor([[1, 2, 3], [1, 2, last]], device=weight.device).clamp(max=last)
    logits: Tensor = model(input_ids=ids, **options).logits
    return logits.float()


def sees_no_later_token(logits: Tensor) -> bool:
    """Return whether logits `[2, T or more, vocabulary]` of the two rows are equal before their last token."""
    first, second = logits[0, : TOKENS - 1], logits[1, : TOKENS - 1]
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        return True  # damaged weights: whoever measures with them says so
    largest = torch.maximum(first.abs().max(), second.abs().max())
    return bool((first - second).abs().max() <= TOLERANCE * largest)
