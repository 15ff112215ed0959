"""Passkey: one number, hidden in a long text, is asked for at its end.

After Mohtashami and Jaggi 2023 (arXiv 2305.16300), who repeat a few sentences for filler. Here it is real text, as in
the needle in a haystack, so that the cache is filled as a document fills it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..base import Settings
from ..results import Metric
from .facts import Phrasing, as_chat_or_code, ask_for
from .needles import Exercise, Needles, TooShort, Writer, filler, stretch

if TYPE_CHECKING:
    from ...models.loading import LoadedModel


class Passkey(Needles):
    """One value in each exercise; depths take turns."""

    name = "passkey"
    metrics = (Metric("passkey", higher_is_better=True),)

    def writer(self, loaded: LoadedModel, settings: Settings, longest: int) -> Writer:
        pool = filler(loaded, settings, longest)
        phrasing = as_chat_or_code(loaded.tokenizer)
        return lambda length, turn, seed: exercise(phrasing, pool, length, seed, self.place(turn, settings.seed))


def exercise(phrasing: Phrasing, pool: Sequence[int], length: int, seed: str, depth: float) -> Exercise:
    """Return an exercise of exactly `length` tokens, with its one value after the share `depth` of the text.

    Raises:
        TooShort: if less than half of it would be text.
    """
    rng = random.Random(seed)
    (fact,) = phrasing.facts(rng, 1)
    taken = len(phrasing.head) + fact.stated + fact.asked
    room = length - taken
    if room < length // 2:
        raise TooShort("passkey", length, 2 * taken, f"the value, its question and its answer take {taken} of them")
    hay = stretch(pool, room, rng)
    spot = round(depth * room)
    before = [*phrasing.head, *hay[:spot], *fact.assign]
    context = (*before, *fact.value, *fact.end, *hay[spot:])
    script, questions = ask_for([fact], context, {fact.name: (len(before), depth)})
    return Exercise(f"exercise {seed}", context, script, questions)
