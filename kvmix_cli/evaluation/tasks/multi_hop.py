"""Multi-hop: a number is given to a name, that name's to another, and so on; the last name's number is asked for.

    depth_stone = 4821
    ... hundreds of tokens of other text ...
    lake_price = depth_stone
    ...
    assert lake_price == 4821

After variable tracking in RULER (Hsieh et al. 2024, arXiv 2404.06654), which asks for all names of one number. Here
each chain is asked for by its end, so that one lost step loses the answer, and an answer is right or wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ...errors import EvaluationError
from ...texts.tokens import encode
from ..base import Settings
from ..results import Metric
from .facts import Fact, Phrasing, as_chat_or_code, ask_for
from .needles import Exercise, Needles, TooShort, Writer, filler, stretch

if TYPE_CHECKING:
    from ...models.loading import LoadedModel

CHAINS = 4
"""Chains in an exercise, each of which is asked for: the others are what it can be mistaken for."""
HOPS = 2


@dataclass(frozen=True)
class MultiHop(Needles):
    """Several chains in each exercise, whose steps are scattered in other text in their order.

    Attributes:
        hops: names after the first one of a chain.
    """

    hops: int | None = None

    name = "multi_hop"
    metrics = (Metric("multi_hop", higher_is_better=True),)
    default_limit = 10

    @property
    def exercises(self) -> int:
        return self.default_limit

    def writer(self, loaded: LoadedModel, settings: Settings, longest: int) -> Writer:
        hops = HOPS if self.hops is None else self.hops
        if hops < 1:
            raise EvaluationError(f"--hops must be at least 1, got {hops}")
        pool, phrasing = filler(loaded, settings, longest), as_chat_or_code(loaded.tokenizer)

        def write(length: int, turn: int, seed: str) -> Exercise:
            turns = range(turn * CHAINS, (turn + 1) * CHAINS)
            places = [self.place(each, settings.seed) for each in turns] if self.depths else None
            return exercise(phrasing, pool, hops, length, seed, places)

        return write

    def content(self, settings: Settings) -> str:
        hops = HOPS if self.hops is None else self.hops
        return f"{settings.text} text, handed on {hops} {'time' if hops == 1 else 'times'}"


def exercise(
    phrasing: Phrasing,
    pool: Sequence[int],
    hops: int,
    length: int,
    seed: str,
    places: Sequence[float] | None = None,
) -> Exercise:
    """Return an exercise of exactly `length` tokens, context and script together.

    Args:
        hops: names after the first one of a chain.
        places: depth of each number; None scatters them in the first half.

    Raises:
        TooShort: if less than half of it would be filler.
    """
    rng = random.Random(seed)
    names = list(phrasing.facts(rng, CHAINS * (hops + 1)))
    chains = [names[start : start + hops + 1] for start in range(0, len(names), hops + 1)]
    ends = [replace(chain[-1], answer=chain[0].answer, value=chain[0].value) for chain in chains]
    steps = [_steps(phrasing, chain) for chain in chains]
    taken = len(phrasing.head) + sum(end.asked for end in ends)
    taken += sum(len(step) for chain in steps for step in chain)
    room = length - taken
    if room < length // 2:
        raise TooShort("multi_hop", length, 2 * taken, f"{CHAINS} chains of {hops + 1} names take {taken} of them")
    first = [round(place * room) for place in places] if places else [rng.randint(0, room // 2) for _ in chains]
    spots = [
        (spot, number, chain)
        for chain, start in enumerate(first)
        for number, spot in enumerate([start, *sorted(rng.randint(start, room) for _ in range(hops))])
    ]
    context, at, done = list(phrasing.head), dict[str, tuple[int, float]](), 0
    for spot, number, chain in sorted(spots):
        context += stretch(pool, spot - done, rng)
        if number == 0:
            depth = places[chain] if places else spot / room
            at[ends[chain].name] = len(context) + len(chains[chain][0].assign), depth
        context += steps[chain][number]
        done = spot
    context += stretch(pool, room - done, rng)
    script, questions = ask_for(rng.sample(ends, len(ends)), context, at)
    return Exercise(f"exercise {seed}", tuple(context), script, questions)


def _steps(phrasing: Phrasing, chain: Sequence[Fact]) -> list[list[int]]:
    """Return the statements of a chain: of the first name's number, and then of each next name by the one before."""
    found = [chain[0].statement]
    for before, fact in pairwise(chain):
        found.append([*fact.assign, *encode(phrasing.tokenizer, phrasing.same(before.name)), *fact.end])
    return found
