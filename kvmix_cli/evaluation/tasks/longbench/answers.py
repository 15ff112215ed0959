"""Asking a model: the prompt enters the cache and is quantized, then the answer is read out of it, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ....cache.subject import Subject, attended
from ....decoding.feed import prefill
from ....quiet import hushed
from ....texts.tokens import encode

if TYPE_CHECKING:
    from ....models.loading import LoadedModel


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens.
        tokens: that were generated, the one that ended it included.
        attended: by this answer, see `cache.subject.attended`.
    """

    text: str
    tokens: int
    attended: dict[str, float]


@torch.inference_mode()
def answer(
    loaded: LoadedModel,
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_at_newline: bool = False,
) -> list[Answer]:
    """Answers to prompts of the same length, at least two tokens, side by side in one cache.

    All of a prompt but its last token is prefilled. In a plain `generate` the prefill itself, which reads unquantized
    keys and values, would decide the first token of the answer; here it is decided by a query that read the cache.

    Prompts of different lengths would need padding, which would take a plan's sink and share pages with the text.
    """
    inputs = torch.tensor([list(ids) for ids in prompts], device=loaded.device)
    cache = subject.cache(loaded.config, reserve=inputs.shape[1] + max_new_tokens)
    prefill(loaded, cache, inputs[:, :-1])
    ends = _ends(loaded, stop_at_newline)
    with hushed():
        generated = loaded.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            min_new_tokens=1 if stop_at_newline else None,
            do_sample=False,
            num_beams=1,
            eos_token_id=ends or None,
            pad_token_id=_pad_token(loaded, ends),
        )
    seen = {key: value / len(prompts) for key, value in attended(cache).items()}
    return [_read(loaded, row, ends, seen) for row in generated[:, inputs.shape[1] :].tolist()]


def _read(loaded: LoadedModel, ids: list[int], ends: list[int], seen: dict[str, float]) -> Answer:
    """An answer from its tokens; what follows the one that ended it is padding."""
    tokens = next((number for number, token in enumerate(ids, 1) if token in ends), len(ids))
    text = loaded.tokenizer.decode(ids[:tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text, tokens, seen)


def _ends(loaded: LoadedModel, stop_at_newline: bool) -> list[int]:
    """Tokens that end an answer: the model's own, and a newline's last token if asked for."""
    own = loaded.model.generation_config.eos_token_id
    if own is None:
        own = loaded.tokenizer.eos_token_id
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    return ends + encode(loaded.tokenizer, "\n")[-1:] if stop_at_newline else ends


def _pad_token(loaded: LoadedModel, ends: list[int]) -> int:
    """What fills the row of an answer that has ended; nothing reads it."""
    known = (loaded.model.generation_config.pad_token_id, loaded.tokenizer.pad_token_id, *ends)
    return next((token for token in known if token is not None), 0)
