"""Trial forwards of a few tokens: what a model's class promises is seen before anything is measured with it.

A class may be listed as a causal language model and yet attend to later tokens, ignore the cache it is given, or need
inputs that text alone does not give. And a class that takes any attention implementation may rely on what its own does
with its mask. Both are found by feeding two rows that differ in their last token only: what is predicted before that
token must be equal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..errors import ModelError, first_sentence, is_out_of_memory
from ..plan import ModelInfo

TOKENS = 3
TOLERANCE = 1e-3
"""Relative to the largest logit. Rows of one product differ by rounding; a token that is seen too early changes them
much more, as the two last tokens have nothing in common."""
PARTS_OF_ENCODER_DECODERS = frozenset({"musicgen", "musicgen_melody", "trocr", "whisper"})
"""Model types whose decoder alone is listed as a causal language model, but was never trained without its encoder."""
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


def check_decoder(config: PreTrainedConfig, model_id: str) -> None:
    """Raise ModelError for an encoder or an encoder-decoder, as far as the configuration tells."""
    if getattr(config, "is_encoder_decoder", False) or config.model_type in PARTS_OF_ENCODER_DECODERS:
        raise ModelError(
            f"{model_id} is an encoder-decoder ({config.model_type}): kvmix takes decoder-only language models"
        )
    classes = getattr(config, "architectures", None) or []
    decodes = any(str(name).endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for name in classes)
    if classes and not decodes and getattr(config, "is_decoder", True) is False:
        raise ModelError(f"{model_id} is an encoder ({classes[0]}): kvmix takes decoder-only language models")


def check_causal(model: PreTrainedModel, model_id: str, info: ModelInfo | None = None) -> None:
    """Raise ModelError unless a model reads text alone, fills transformers' cache, and sees no later token.

    With `info` also if it caches other KV heads than its configuration tells.
    """
    try:
        cache = DynamicCache(config=model.config)
        output = _forward(model, past_key_values=cache, use_cache=True)
        _forward(model, past_key_values=cache, use_cache=True)  # as an evaluation reads several tokens back at a time
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
    if not _is_causal(output):
        raise ModelError(
            f"{type(model).__name__} of {model_id} attends to later tokens, as an encoder does: "
            "kvmix takes decoder-only language models"
        )


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


def is_causal(model: PreTrainedModel) -> bool:
    """Return whether predictions depend on earlier tokens only; false if the model does not run at all."""
    try:
        return _is_causal(_forward(model, use_cache=False))
    except LIBRARY_ERRORS as error:
        if is_out_of_memory(error):
            raise
        return False


@torch.inference_mode()
def _forward(model: PreTrainedModel, **options: object) -> Tensor:
    """Return the logits `[2, T, vocabulary]` of two rows that differ in their last token only."""
    weight = model.get_input_embeddings().weight
    last = weight.shape[0] - 1
    ids = torch.tensor([[1, 2, 3], [1, 2, last]], device=weight.device).clamp(max=last)
    logits: Tensor = model(input_ids=ids, **options).logits
    return logits.float()


def _is_causal(logits: Tensor) -> bool:
    first, second = logits[0, : TOKENS - 1], logits[1, : TOKENS - 1]
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        return True  # damaged weights: whoever measures with them says so
    largest = torch.maximum(first.abs().max(), second.abs().max())
    return bool((first - second).abs().max() <= TOLERANCE * largest)
