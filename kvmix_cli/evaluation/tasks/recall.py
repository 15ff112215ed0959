"""Recall: values that were assigned far back must be read out of the cache again.

    depth_stone = 4821
    ... hundreds of tokens of other text ...
    assert depth_stone == 4821

Perplexity depends mostly on the nearest tokens, recall on far ones. The values are random: only the cache has them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ..base import Settings
from ..records import RecallRecord
from ..results import Estimate, Metric
from .facts import as_code, ask_for
from .needles import Exercise, Needles, TooShort, Writer, filler, stretch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...models.loading import LoadedModel

VALUES = 6


class Recall(Needles):
    """Several values in each exercise, scattered in the first half of other text, or at the depths of `--depths`."""

    name = "recall"
    metrics = (Metric("recall", higher_is_better=True), Metric("recalled", higher_is_better=True, unit="values"))
    default_limit = 10

    @property
    def exercises(self) -> int:
        return self.default_limit

    def writer(self, loaded: LoadedModel, settings: Settings, longest: int) -> Writer:
        pool = filler(loaded, settings, longest)

        def write(length: int, turn: int, seed: str) -> Exercise:
            turns = range(turn * VALUES, (turn + 1) * VALUES)
            places = self.depths and [self.place(each, settings.seed) for each in turns]
            return exercise(loaded.tokenizer, pool, length, seed, places or None)

        return write

    def summarise(
        self, records: Sequence[RecallRecord], reference: Sequence[RecallRecord] | None, seed: int
    ) -> dict[str, Estimate]:
        share = super().summarise(records, reference, seed)["recall"]
        values = sum(record["values"] for record in records)
        return {"recall": share, "recalled": share.map(lambda part: part * values)}


def exercise(
    tokenizer: PreTrainedTokenizerBase,
    pool: Sequence[int],
    length: int,
    seed: str,
    places: Sequence[float] | None = None,
) -> Exercise:
    """Return an exercise of exactly `length` tokens, context and script together.

    Args:
        places: depth of each value; None scatters them in the first half.

    Raises:
        TooShort: if less than half of it would be filler.
    """
    rng = random.Random(seed)
    phrasing = as_code(tokenizer)
    facts = list(phrasing.facts(rng, VALUES))
    asked = rng.sample(facts, len(facts))
    taken = len(phrasing.head) + sum(fact.stated + fact.asked for fact in facts)
    room = length - taken
    if room < length // 2:
        raise TooShort("recall", length, 2 * taken, f"{VALUES} values take {taken} of them")
    if places is None:
        cuts = sorted(rng.randint(0, room // 2) for _ in facts)
        spots = [(cut, cut / room) for cut in cuts]
    else:
        spots = sorted((round(place * room), place) for place in places)
    context, at = list(phrasing.head), {}
    for fact, (last, (spot, depth)) in zip(facts, pairwise([(0, 0.0), *spots]), strict=True):
        context += stretch(pool, spot - last[0], rng) + fact.assign
        at[fact.name] = len(context), depth
        context += fact.value + fact.end
    context += stretch(pool, room - spots[-1][0], rng)
    script, questions = ask_for(asked, context, at)
    return Exercise(f"exercise {seed}", tuple(context), script, questions)
