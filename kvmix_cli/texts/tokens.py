"""Token ids of texts: encoding, the token that opens a text, and samples of a given length, never padded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TOKENS = 32
"""Shorter pieces say little about attention and are dropped."""
POOL = 16
"""Full-length pieces to choose from for every sample wanted; further documents are not even tokenized."""

Samples = list[list[int]]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a piece of text, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that this tokenizer itself puts before every text, as a list of one; empty if there is none."""
    ids: list[int] = tokenizer("").input_ids
    return list(ids[:1]) if ids and ids[0] == tokenizer.bos_token_id else []


def cut_samples(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    samples: int,
    seq_len: int,
    seed: int,
    *,
    shortest: int = 0,
    max_length: int | None = None,
) -> Samples:
    """Return the token ids of `samples` pieces of at most `seq_len` tokens, chosen by seed, full-length ones first.

    There are fewer if the text has no more.

    Args:
        shortest: tokens that a sample must have for the scores that are measured on it.
        max_length: tokens that the model takes; None if it sets no limit.

    Raises:
        TextError: if nothing is left, or the model does not take that many tokens.
    """
    _check(samples, seq_len, shortest, max_length)
    least = max(shortest, min(MIN_TOKENS, seq_len))
    chooser = random.Random(seed)
    documents = chooser.sample(texts, len(texts))
    pieces = _pool(tokenizer, documents, seq_len, least, POOL * samples)
    if not pieces:
        raise TextError(f"no calibration text of at least {least} tokens: give more text")
    chooser.shuffle(pieces)
    return sorted(pieces, key=len, reverse=True)[:samples]


def _check(samples: int, seq_len: int, shortest: int, max_length: int | None) -> None:
    if samples < 1 or seq_len < 2:
        raise TextError(f"cannot profile {samples} samples of {seq_len} tokens: at least 1 sample of 2 tokens")
    if seq_len < shortest:
        raise TextError(
            f"in {seq_len} tokens nothing is read that the cache has packed: use a --seq-len of {shortest} or more"
        )
    if max_length is not None and seq_len > max_length:
        raise TextError(f"the model takes at most {max_length} tokens, not {seq_len}: use a smaller --seq-len")


def _pool(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seq_len: int, least: int, enough: int
) -> Samples:
    """Return pieces of the documents, in order, until there are `enough` of full length.

    Each begins with the opening token and has at least `least` tokens.
    """
    first = opening(tokenizer)
    room = seq_len - len(first)
    pieces: Samples = []
    full = 0
    for document in documents:
        ids = encode(tokenizer, document)
        cut = [first + ids[start : start + room] for start in range(0, len(ids), room)]
        pieces += [piece for piece in cut if len(piece) >= least]
        full += sum(len(piece) == seq_len for piece in cut)
        if full >= enough:
            break
    return pieces
