"""Settings of a generation, and the one call of a model's `generate`.

transformers takes every setting that is left open from the checkpoint's generation_config.json: `use_cache: false`
feeds the context anew for each token, `cache_implementation: static` replaces the cache, `num_beams` changes the number
of rows. Here only the tokens that end a text and the penalties below come from that file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from ..errors import ModelError, first_sentence
from ..quiet import hushed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from ..models.loading import LoadedModel

NO_PENALTY: dict[str, float | None] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
"""Settings of a checkpoint that change scores of tokens and stay in force, each with the value that changes nothing."""
_PROCESSORS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
    "bad_words_ids": NoBadWordsLogitsProcessor,
    "sequence_bias": SequenceBiasLogitsProcessor,
    "suppress_tokens": SuppressTokensLogitsProcessor,
    "begin_suppress_tokens": SuppressTokensLogitsProcessor,
}
"""The class in transformers that applies each of them."""
_FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of these classes for a value that they do not take."""
RESERVED_TOKENS = 4096
"""Tokens of an answer for which room is made at once: most answers are shorter than what is allowed."""


def greedy_settings(
    loaded: LoadedModel, max_new_tokens: int, *, ends: Sequence[int] | None = None, **chosen: Any
) -> GenerationConfig:
    """Return the settings of a greedy generation, one row of tokens for each prompt.

    Args:
        ends: ids of tokens that end an answer; None for `end_tokens`, empty for none.
        chosen: settings of the caller, such as `min_new_tokens`, or `do_sample` and `temperature` for sampling.

    Raises:
        ModelError: if the checkpoint's end tokens or penalties have values that cannot be used.

    Warns:
        UserWarning: about penalties of the checkpoint that stay in force.
    """
    found = end_tokens(loaded) if ends is None else list(ends)
    kept = _penalties(loaded.model.generation_config)
    if kept := {name: value for name, value in kept.items() if name not in chosen}:
        _check_penalties(loaded, kept)
        listed = ", ".join(
            f"{name} {value if isinstance(value, (int, float)) else 'set'}" for name, value in kept.items()
        )
        warnings.warn(
            f"generation_config.json of {loaded.info.id} changes the scores of tokens, and answers follow it: {listed}",
            stacklevel=2,
        )
    ours: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "use_cache": True,
        "return_dict_in_generate": False,
        "eos_token_id": found or None,
        "pad_token_id": _pad_token(loaded, found),
    }
    return GenerationConfig(**{**ours, **kept, **chosen})


def end_tokens(loaded: LoadedModel) -> list[int]:
    """Return the ids of all tokens that end a text and that the model knows: the checkpoint's and the tokenizer's.

    Raises:
        ModelError: if the checkpoint's are no token ids.
    """
    listed = loaded.model.generation_config.eos_token_id
    own = listed if isinstance(listed, list) else [listed]
    if not all(token is None or isinstance(token, int) for token in own):
        raise _unusable(loaded, "eos_token_id", listed, "expected a token id or a list of them")
    found = dict.fromkeys((*own, loaded.tokenizer.eos_token_id))
    return [token for token in found if token is not None and 0 <= token < loaded.vocabulary]


@torch.inference_mode()
def continue_tokens(
    loaded: LoadedModel,
    ids: Tensor,
    cache: Cache,
    settings: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return rows of ids `[B, T]` with what the model adds to them through a cache, `[B, T + new]`.

    The cache may hold the first tokens of each row already; only the others are fed to it. `inputs` is what the model
    reads beside the ids, such as the pixels of images.

    Raises:
        ModelError: if a score of a token is NaN, of which the largest would be any token.
    """
    more = {name: _placed(value, loaded.model.dtype, loaded.device) for name, value in (inputs or {}).items()}
    with hushed(), _without_defaults(loaded.model):
        found: Tensor = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            generation_config=settings,
            streamer=streamer,
            logits_processor=LogitsProcessorList([*(logits_processor or ()), _NanRefusal(loaded)]),
            stopping_criteria=stopping_criteria,
            **more,
        )
    return found


class _NanRefusal(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """A check of each token's scores `[B, V]`, which changes none of them."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise ModelError(
                f"{self._loaded.info.id} gives NaN as scores of the next token, in {self._loaded.dtype}: its weights "
                "are damaged, or its numbers too large for that dtype (--dtype float32)"
            )
        return scores


def _placed(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def reserve(prompt_tokens: int, new_tokens: int) -> int:
    """Return the tokens to make room for before a generation; a longer answer makes its cache grow."""
    return prompt_tokens + min(new_tokens, RESERVED_TOKENS)


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Hide the checkpoint's generation settings, which `generate` uses for everything that is left open."""
    theirs = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = theirs


def _penalties(config: GenerationConfig) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in NO_PENALTY}
    return {name: value for name, value in found.items() if value and value != NO_PENALTY[name]}


def _check_penalties(loaded: LoadedModel, kept: Mapping[str, Any]) -> None:
    """Apply each penalty to scores of zero. Raises ModelError for one that transformers does not take."""
    for name, value in kept.items():
        try:
            _PROCESSORS[name](value)(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, loaded.vocabulary))
        except _FAULTS as error:
            raise _unusable(loaded, name, value, first_sentence(error)) from error


def _unusable(loaded: LoadedModel, name: str, value: object, reason: str) -> ModelError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ModelError(
        f"generation_config.json of {loaded.info.id} has {name} {shown}, which cannot be used: {reason}; "
        "correct it there, or take it out"
    )


def _pad_token(loaded: LoadedModel, ends: Sequence[int]) -> int:
    """Return an id for the rest of a row whose answer has ended: fed to the model, read by nobody."""
    known = (loaded.model.generation_config.pad_token_id, loaded.tokenizer.pad_token_id, *ends)
    return next((token for token in known if isinstance(token, int) and 0 <= token < loaded.vocabulary), 0)
