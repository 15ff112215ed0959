"""Prompts of any length and number, cut from the text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ....errors import TextError
from ....texts import load_texts
from ....texts.tokens import beginning, opening

if TYPE_CHECKING:
    from torch import Tensor

    from ....models.loading import LoadedModel
    from ...base import Settings

SPARE = 4096
"""Tokens of text beyond a prompt, at least, so that as many rows can begin at different places."""


def stretch(loaded: LoadedModel, settings: Settings, length: int) -> tuple[int, ...]:
    """Return text that rows of `length` tokens are cut from: the opening token, then documents in a seeded order.

    Raises:
        TextError: if there is not even one row, or the embedding does not have one of the tokens.
    """
    first = opening(loaded.tokenizer)
    wanted = length + max(length, SPARE)
    texts = load_texts(settings.text, held_out=True, seed=settings.seed)
    found: list[int] = []
    for index in random.Random(settings.seed).sample(range(len(texts)), len(texts)):
        found += beginning(loaded.tokenizer, texts[index], wanted - len(found))
        if len(found) >= wanted:
            break
    if len(first) + len(found) < length:
        raise TextError(
            f"{settings.text}: {len(found)} tokens of text in all are no prompt of {length}; "
            "give more with --text or a smaller --length or --contexts"
        )
    loaded.check_ids([found])
    return (*first, *found[:wanted])


def rows(loaded: LoadedModel, text: Sequence[int], length: int, batch: int) -> Tensor:
    """Return ids `[batch, length]`: the opening token if there is one, then text from a different place in each row."""
    first = torch.tensor(opening(loaded.tokenizer), dtype=torch.long)
    places = torch.tensor(text[len(first) :]).unfold(0, length - len(first), 1)
    begins = torch.arange(batch) * (len(places) - 1) // batch
    return torch.cat([first.expand(batch, -1), places[begins]], dim=1)
