"""Token ids of texts: what a tokenizer makes of a text, and the token that it puts before one."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a piece of text, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that this tokenizer itself puts before every text, as a list of one; empty if there is none."""
    ids: list[int] = tokenizer("").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
