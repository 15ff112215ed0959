"""The search for the largest batch that fits in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ....decoding.timing import Timing

MOST = 4096
"""Sequences; the search goes no further."""
STEP_DOWN = 32
"""If a whole generation does not fit a batch whose first steps do, one part in so many of the batch is left out."""


def largest(fits: Callable[[int], bool], guess: int = 1, most: int = MOST) -> int:
    """Return the largest count up to `most` that fits, 0 if not even one does. If a count fits, all smaller ones must.

    From the guess in steps that double, up or down, until the limit lies between two counts; then by halves. From a
    guess of 1 that is 1, 2, 4, 8, ...; from a guess that fits, never more than twice what has fitted.
    """
    guess = max(1, min(guess, most))
    step = 1
    if fits(guess):
        low, high = guess, min(guess + step, most + 1)
        while high <= most and fits(high):
            step *= 2
            low, high = high, min(high + step, most + 1)
    else:
        low, high = max(guess - step, 0), guess
        while low > 0 and not fits(low):
            step *= 2
            low, high = max(low - step, 0), low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass
class Search:
    """Batches tried for one cache at one context.

    Attributes:
        trial: times a prompt and one decoded token of a batch; None if memory ran out.
        memory: bytes that it may take, None for all there are.
        tried: bytes that each batch took; None if there were not enough.
    """

    trial: Callable[[int], Timing | None]
    memory: int | None
    tried: dict[int, int | None] = field(default_factory=dict)

    def run(self, room: int | None) -> int:
        """Return the largest batch that fits.

        Args:
            room: bytes that are free; divided by those of one sequence they are the first guess.
        """
        if not self.fits(1):
            return 0
        return largest(self.fits, guess=(room or 0) // max(1, self.tried[1] or 1))

    def fits(self, batch: int) -> bool:
        """Return whether a trial has enough memory; each batch is tried once."""
        if batch not in self.tried:
            timing = self.trial(batch)
            self.tried[batch] = None if timing is None else timing.bytes
        needed = self.tried[batch]
        return needed is not None and (self.memory is None or needed <= self.memory)


def time_largest(measure: Callable[[int], Timing | None], found: int, repeats: int) -> tuple[int, list[Timing]]:
    """Return a batch and its timings: the batch whose first steps fit, or a smaller one if later steps do not."""
    batch = found
    while batch > 0:
        timings: list[Timing] = []
        while len(timings) < repeats and (timing := measure(batch)) is not None:
            timings.append(timing)
        if len(timings) == repeats:
            return batch, timings
        batch -= max(1, batch // STEP_DOWN)
    return 0, []
