"""Statistics that scores keep of the tokens that wait to be sorted: what the count of bytes must know of them.

`cache/policies` has the scores themselves; each declares what it reads, and a test compares it with the table here.
"""

from __future__ import annotations

from dataclasses import dataclass

PRESS = "press:"
"""Begins the name of a score of kvpress, `press:SnapKVPress(window_size=32)`."""
PARTS = 2
"""A sum over queries has two parts: that of the last forward is apart, so that it can be taken back."""


@dataclass(frozen=True)
class WaitingStatistics:
    """The numbers, float32, that a score keeps while tokens wait to be sorted.

    Attributes:
        weighs: every KV head keeps the attention that each token has received.
        last: it is kept apart for so many of the last queries; 0 for their sum, or their maximum.
        counts: the number of queries that could see each token is kept, too.
        follows: under a token budget, what is kept goes on receiving it.
        queries: queries of the prompt that every KV head keeps, `[queries, D]`.
    """

    weighs: bool = False
    last: int = 0
    counts: bool = False
    queries: int = 0
    follows: bool = False

    def of_unit(self, is_chosen_again: bool, context: int) -> int:
        """Return the numbers of each unit that a token budget keeps, a token after the last choice."""
        return self._rows(context) if self.follows and is_chosen_again else 1

    def numbers(self, kv_heads: int, context: int) -> int:
        """Return the numbers of each waiting token in all KV heads, after a prompt of `context` tokens."""
        return self._rows(context) * self.weighs * kv_heads + PARTS * self.counts

    def _rows(self, context: int) -> int:
        """Return the numbers that a KV head keeps of what a token, or a unit, has received."""
        return min(self.last, context) + 1 if self.last else PARTS


READ_AGAIN = frozenset({"kvzip"})
"""Scores of a prompt that is read a second time, which only layers that sort tokens can take back."""
NOTHING = WaitingStatistics()
ATTENTION = WaitingStatistics(weighs=True)
"""Attention of waiting tokens only."""
_KNOWN: dict[str, WaitingStatistics] = {
    "attention": WaitingStatistics(weighs=True, follows=True),
    "normalised": WaitingStatistics(weighs=True, counts=True),
    "snapkv": WaitingStatistics(weighs=True, last=32, follows=True),
    "tova": WaitingStatistics(weighs=True, last=1, follows=True),
    "morphkv": WaitingStatistics(weighs=True, last=32, follows=True),
    "kvcrush": ATTENTION,
    "kvzip": ATTENTION,
    "bumblebee": ATTENTION,
    "expected-attention": WaitingStatistics(queries=64),
    **dict.fromkeys(("keydiff", "leverage", "key-norm", "recency", "random", "balancekv", "subgen"), NOTHING),
}


def statistics_of(score: str) -> WaitingStatistics:
    """Return the statistics of a score by its name; those of attention for a name that nothing was declared for."""
    return _KNOWN.get(score, ATTENTION)


def declare(score: str, statistics: WaitingStatistics) -> None:
    """Make the statistics of a user's own score known."""
    _KNOWN.setdefault(score, statistics)
