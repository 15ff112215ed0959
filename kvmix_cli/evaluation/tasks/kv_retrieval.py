"""Key-value retrieval: a context that is nothing but names and numbers, and one of the numbers is asked for.

After Liu et al. 2023, "Lost in the middle" (arXiv 2307.03172). Every line looks like the one that is asked
for, so keys that differ little must stay apart: harder than a needle in other text, and lost earlier with coarse keys.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ..base import Settings
from ..results import Metric
from .facts import Fact, Phrasing, as_chat_or_code, ask_for
from .needles import DEPTHS, TRIES, Exercise, Needles, TooShort, Writer

if TYPE_CHECKING:
    from ...models.loading import LoadedModel

FEWEST_TOKENS = 6
"""Tokens of a line in any tokenizer; bounds the number of names that are drawn."""


class KVRetrieval(Needles):
    """One value is asked for in each exercise; the depths of its line take turns."""

    name = "kv_retrieval"
    metrics = (Metric("kv_retrieval", higher_is_better=True),)
    default_limit = TRIES * DEPTHS

    @property
    def exercises(self) -> int:
        return TRIES * len(self.places())

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
    rng = random.Random(seed)
    facts = phrasing.facts(rng, max(lines, 2, length // FEWEST_TOKENS))
    wanted = next(facts)
    room = length - len(phrasing.head) - wanted.asked - wanted.stated
    others: list[Fact] = []
    for fact in facts:
        if fact.stated > room and len(others) >= max(lines - 1, 1):
            break
        others.append(fact)
        room -= fact.stated
    if room < 0:
        raise TooShort(
            "kv_retrieval", length, length - room, f"{len(others) + 1} lines and the question take {length - room}"
        )
    spot = round(depth * len(others))
    before = [*phrasing.head, *[phrasing.blank] * room, *_lines(others[:spot]), *wanted.assign]
    context = (*before, *wanted.value, *wanted.end, *_lines(others[spot:]))
    script, questions = ask_for([wanted], context, {wanted.name: (len(before), depth)})
    return Exercise(f"exercise {seed}", context, script, questions)


def _lines(facts: list[Fact]) -> list[int]:
    return [token for fact in facts for token in (*fact.assign, *fact.value, *fact.end)]
