"""Key-value retrieval: a context that is nothing but names and numbers, and one of the numbers is asked for.

After Liu et al. 2023, "Lost in the middle" (arXiv 2307.03172). Every line looks like the one that is asked
for, so keys that differ little must stay apart: harder than a needle in other text, and lost earlier with coarse keys.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ..base import Settings
from ..results import Metric
from .facts import Phrasing, as_chat_or_code
from .needles import Exercise, Needles, Writer, alike

if TYPE_CHECKING:
    from ...models.loading import LoadedModel

FEWEST_TOKENS = 6
"""Tokens of a line in any tokenizer; bounds the number of names that are drawn."""


class KVRetrieval(Needles):
    """One value is asked for in each exercise; the depths of its line take turns."""

    name = "kv_retrieval"
    metrics = (Metric("kv_retrieval", higher_is_better=True),)
    unread = ("prefix", "text")

    def writer(self, loaded: LoadedModel, settings: Settings, longest: int) -> Writer:
        phrasing, lines = as_chat_or_code(loaded.tokenizer), len(self.places())
        return lambda length, turn, seed: exercise(phrasing, lines, length, seed, self.place(turn, settings.seed))

    def content(self, settings: Settings) -> str:
        return "names and numbers"


def exercise(phrasing: Phrasing, lines: int, length: int, seed: str, depth: float) -> Exercise:
    """Return an exercise of exactly `length` tokens, its question about the line after the share `depth` of the others.

    Raises:
        TooShort: if there is no room for so many lines.
    """
    least = max(lines, 2)
    facts = phrasing.facts(random.Random(seed), max(least, length // FEWEST_TOKENS))
    return alike(
        "kv_retrieval", facts, phrasing.head, phrasing.blank, length=length, least=least, depths=[depth], seed=seed
    )
