"""Pyramids: what layers drop, or keep, by depth, evenly from the first one to the last (PyramidKV, MiniKV)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

from pydantic import Field, model_validator

from ..document.fields import MOST_TOKENS, Share
from ..document.strict_yaml import StrictModel
from ..layers import LayerPlan
from ..settings import CacheSettings
from ..tokens import TokenShares


class EvictedByDepth(StrictModel):
    """Shares of the tokens that the first layer evicts, and the last one."""

    first: Share
    last: Share


class KeptByDepth(StrictModel):
    """Tokens that the first layer keeps, and the last one, sinks and window included."""

    first: int = Field(ge=0, le=MOST_TOKENS)
    last: int = Field(ge=0, le=MOST_TOKENS)


class WholeEnds(StrictModel):
    """Numbers of layers, of the first ones and of the last ones, that keep all tokens."""

    first: int = Field(default=0, ge=0)
    last: int = Field(default=0, ge=0)


class Pyramid(StrictModel):
    """Shares, or numbers of tokens, of the layers of a token policy: a line between two ends.

    Attributes:
        evict: shares that are evicted.
        keep: tokens that are kept; exactly one of both.
        whole: layers at both ends that keep all tokens; the line is of those between them.
    """

    evict: EvictedByDepth | None = None
    keep: KeptByDepth | None = None
    whole: WholeEnds = Field(default_factory=WholeEnds)

    @model_validator(mode="after")
    def _decided_once(self) -> Pyramid:
        if (self.evict is None) == (self.keep is None):
            raise ValueError("must have either evict or keep, {first, last} of one of them")
        return self

    def put_on(self, layers: Mapping[int, LayerPlan], cache: CacheSettings) -> dict[int, LayerPlan]:
        """Return layers with their part of the pyramid, in whole pages; what is rounded is made up for by later layers.

        Raises:
            ValueError: if the cache sorts no tokens, or no layer is left between those that keep all of them.
        """
        if cache.tokens is None:
            raise ValueError("a pyramid of tokens needs a token policy, cache.tokens")
        order = sorted(layers)[self.whole.first : len(layers) - self.whole.last]
        if not order:
            ends = f"the first {self.whole.first} and the last {self.whole.last}"
            raise ValueError(f"no layer is left between {ends}, which keep all tokens: there are {len(layers)}")
        if self.evict is not None:
            pages = cache.tokens.flush // cache.page
            counts = _rounded([share * pages for share in _line(self.evict.first, self.evict.last, len(order))])
            shares = [TokenShares(evict=count / pages) for count in counts]
        else:
            kept = self.keep or KeptByDepth(first=0, last=0)
            counts = _rounded([count / cache.page for count in _line(kept.first, kept.last, len(order))])
            shares = [TokenShares(keep=count * cache.page) for count in counts]
        own = {**dict.fromkeys(layers, TokenShares(evict=0.0)), **dict(zip(order, shares, strict=True))}
        return {index: layer.model_copy(update={"tokens": own[index]}) for index, layer in layers.items()}


def _line(first: float, last: float, count: int) -> Iterator[Fraction]:
    """Yield `count` numbers evenly from the first to the last."""
    ends = [Fraction(end).limit_denominator(10_000) for end in (first, last)]
    for place in range(count):
        yield ends[0] + (ends[1] - ends[0]) * place / max(1, count - 1)


def _rounded(numbers: Sequence[Fraction]) -> list[int]:
    """Return whole numbers whose running sums are those of the numbers, rounded."""
    total, sums = Fraction(0), [0]
    for number in numbers:
        total += number
        sums.append(round(total))
    return [after - before for before, after in pairwise(sums)]
