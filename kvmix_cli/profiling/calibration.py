"""From documents to the samples that are profiled: whole pieces of text, never padded."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import TextError
from ..models.loading import LoadedModel
from ..profile import Calibration

MIN_TOKENS = 32
"""Shorter pieces say little about attention and are dropped."""
POOL = 16
"""Full-length pieces to choose from for every sample wanted; further documents are not even tokenized."""

Samples = list[list[int]]


def cut_samples(
    loaded: LoadedModel, texts: Sequence[str], samples: int, seq_len: int, seed: int, shortest: int = 0
) -> Samples:
    """Token ids of `samples` pieces of at most `seq_len` tokens, chosen by seed, full-length ones first.

    There are fewer if the text has no more.

    Args:
        shortest: tokens that a sample must have for the scores that are measured on it.

    Raises:
        TextError: if nothing is left, or the model does not take that many tokens.
    """
    _require_possible(loaded, samples, seq_len, shortest)
    least = max(shortest, min(MIN_TOKENS, seq_len))
    chooser = random.Random(seed)
    documents = chooser.sample(texts, len(texts))
    pieces = _pool(loaded.tokenizer, documents, seq_len, least, POOL * samples)
    if not pieces:
        raise TextError(f"no calibration text of at least {least} tokens: give more text")
    chooser.shuffle(pieces)
    return sorted(pieces, key=len, reverse=True)[:samples]


def describe(samples: Samples, source: str, seq_len: int, seed: int) -> Calibration:
    """What a profile records of its samples."""
    digest = hashlib.sha256()
    for ids in samples:
        digest.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
    return Calibration(
        source=source,
        sha256=digest.hexdigest(),
        samples=len(samples),
        seq_len=seq_len,
        seed=seed,
        tokens=sum(map(len, samples)),
    )


def _require_possible(loaded: LoadedModel, samples: int, seq_len: int, shortest: int) -> None:
    if samples < 1 or seq_len < 2:
        raise TextError(f"cannot profile {samples} samples of {seq_len} tokens: at least 1 sample of 2 tokens")
    if seq_len < shortest:
        raise TextError(
            f"in {seq_len} tokens nothing is read that the cache has packed: use a --seq-len of {shortest} or more"
        )
    if loaded.max_length is not None and seq_len > loaded.max_length:
        raise TextError(
            f"{loaded.info.id} takes at most {loaded.max_length} tokens, not {seq_len}: use a smaller --seq-len"
        )


def _pool(tokenizer: Any, documents: Sequence[str], seq_len: int, least: int, enough: int) -> Samples:
    """Pieces of the documents, in order, until there are `enough` of full length."""
    start = _start(tokenizer)
    pieces: Samples = []
    full = 0
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        cut = _cut(ids, start, seq_len, least)
        pieces += cut
        full += sum(len(piece) == seq_len for piece in cut)
        if full >= enough:
            break
    return pieces


def _cut(ids: list[int], start: list[int], seq_len: int, least: int) -> Samples:
    """Consecutive pieces of at least `least` tokens, each with those that start a text."""
    room = seq_len - len(start)
    pieces = [start + ids[first : first + room] for first in range(0, len(ids), room)]
    return [piece for piece in pieces if len(piece) >= least]


def _start(tokenizer: Any) -> list[int]:
    """`[bos]` if this tokenizer puts one before every text, otherwise nothing."""
    first = list(tokenizer("")["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []
