"""Token ids of texts: encoding, the token that opens a text, and samples of a given length, never padded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from ..counting import counted
from ..errors import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TOKENS = 32
"""Shorter pieces say little about attention and are dropped."""

CHARACTERS = 16
"""Characters that are encoded for each token that is wanted of a text; those of prose have about four."""
MARGIN = 256
"""Tokens at the end of a piece of text that may differ from those of the whole text."""
PARTS = 64
"""Parts of a long document that samples are taken from, unless there are more samples: the same for any number."""

Samples = list[list[int]]


def check_text(text: str, where: str = "a text") -> None:
    """Raise TextError for half of a surrogate pair, which JSON can write as an escape and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise TextError(f"{where} has {half}, half of a character, at position {error.start}: correct it") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a piece of text, without special tokens. Raises TextError if it is no text."""
    check_text(text)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def beginning(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> list[int]:
    """Return at least `tokens` of the first token ids of a text, or all that it has.

    A text much longer than that is not encoded as a whole: 40 MB take minutes.

    Raises:
        TextError: if what is encoded is no text.
    """
    end = CHARACTERS * (tokens + MARGIN)
    while end < len(text):
        ids = encode(tokenizer, text[:end])[:-MARGIN]
        if len(ids) >= tokens:
            return ids
        end *= 4
    return encode(tokenizer, text)


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
    """Return the token ids of `samples` pieces of at most `seq_len` tokens, full-length ones first.

    Each is of another document, which the seed chooses as it chooses the piece; only where these are too few does a
    document give a second one. So a long document counts no more than a short one. Documents are taken evenly from the
    whole list, and text of several kinds is mixed. There are fewer samples if the text has no more.

    Args:
        shortest: tokens that a sample must have for the scores that are measured on it.
        max_length: tokens that the model takes; None if it sets no limit.

    Raises:
        TextError: if nothing is left, or the model does not take that many tokens.
    """
    _check(samples, seq_len, shortest, max_length)
    least = max(shortest, min(MIN_TOKENS, seq_len))
    chooser = random.Random(seed)
    found = list(_documents(tokenizer, spread(texts, chooser), seq_len, least, samples))
    if not found:
        raise TextError(f"no calibration text of at least {least} tokens: give more text")
    ranked = [sorted(chooser.sample(pieces, len(pieces)), key=len, reverse=True) for pieces in found]
    turns = [piece for turn in zip_longest(*ranked) for piece in turn if piece is not None]
    return sorted(turns, key=len, reverse=True)[:samples]


def spread(texts: Sequence[str], chooser: random.Random) -> list[str]:
    """Return texts in a random order in which the halves of the list take turns, and their halves likewise.

    So the first of them are from all parts of the list, where neighbours are often of one kind.
    """
    if len(texts) < 2:
        return list(texts)
    middle = (len(texts) + 1) // 2
    halves = [spread(half, chooser) for half in chooser.sample((texts[:middle], texts[middle:]), 2)]
    return [text for pair in zip_longest(*halves) for text in pair if text is not None]


def _check(samples: int, seq_len: int, shortest: int, max_length: int | None) -> None:
    if samples < 1 or seq_len < 2:
        raise TextError(
            f"cannot profile {counted(samples, 'sample')} of {counted(seq_len, 'token')}: at least 1 sample of 2 tokens"
        )
    if seq_len < shortest:
        raise TextError(
            f"in {seq_len} tokens nothing is read that the cache has packed: use a --seq-len of {shortest} or more"
        )
    if max_length is not None and seq_len > max_length:
        raise TextError(f"the model takes at most {max_length} tokens, not {seq_len}: use a smaller --seq-len")


def _parts(text: str, count: int, tokens: int) -> list[str]:
    """Return a text whole; of one much longer than `count` pieces of `tokens`, evenly placed parts for one each.

    They may begin within a word.
    """
    size = CHARACTERS * (tokens + MARGIN)
    if len(text) <= 2 * count * size:
        return [text]
    return [text[(start := len(text) * number // count) : start + size] for number in range(count)]


def _documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], seq_len: int, least: int, enough: int
) -> Iterator[Samples]:
    """Yield the pieces of each document that has any, until `enough` of them have had one of full length.

    Each begins with the opening token and has at least `least` tokens. Further documents are not even tokenized, nor is
    more of a long one than such pieces take.
    """
    first = opening(tokenizer)
    room, samples = seq_len - len(first), enough
    for document in documents:
        parts = (encode(tokenizer, part) for part in _parts(document, max(PARTS, samples), room))
        cut = [first + ids[start : start + room] for ids in parts for start in range(0, len(ids), room)]
        if pieces := [piece for piece in cut if len(piece) >= least]:
            yield pieces
            enough -= len(pieces[0]) == seq_len
        if enough == 0:
            return
