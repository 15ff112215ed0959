"""Choosing text to feed to a model, and what its cache has seen of it."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import TYPE_CHECKING

from ..errors import TextError
from .base import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..models.loading import LoadedModel


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a piece of text, without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that this tokenizer itself puts before a text, if any."""
    ids: list[int] = tokenizer("").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def chunks(loaded: LoadedModel, texts: Sequence[str], source: str, length: int, limit: int, seed: int) -> list[Sample]:
    """Up to `limit` samples of `length` tokens: one of every document, in a seeded order, then a second one, and so on.

    Raises:
        TextError: if no document is long enough.
    """
    found = list(islice(_parts(loaded.tokenizer, texts, length, seed), limit))
    if not found:
        longest = len(encode(loaded.tokenizer, max(texts, key=len, default="")))
        raise TextError(
            f"{source}: no document has {length} tokens, the longest has {longest}; "
            "give longer text with --text or a smaller --length"
        )
    return found


def _parts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, seed: int) -> Iterator[Sample]:
    """All samples that there are; a document is encoded when it is reached."""
    first = opening(tokenizer)
    body = length - len(first)
    order = [index for index, text in enumerate(texts) if len(text.encode()) >= body]
    random.Random(seed).shuffle(order)
    encode_once = functools.cache(lambda index: encode(tokenizer, texts[index]))
    for part in count():
        longer = []
        for index in order:
            ids = encode_once(index)[part * body : (part + 1) * body]
            if len(ids) == body:
                longer.append(index)
                yield Sample(f"document {index} part {part}", (*first, *ids))
        if not longer:
            return
        order = longer
