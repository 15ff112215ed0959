"""Sorting the tokens of one layer into tiers as they leave the window; keys and values alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kvmix_kernels.segments import EVICTED
from torch import Tensor

from ..plan.policies import TokenPolicy
from .buffer import Buffer
from .observing import Rows
from .policies import TOKEN_SCORES, Candidates
from .tally import Tally


class TokenSorter:
    """Keeps what is known about the tokens of the tail, and sorts them when they leave it.

    Attributes:
        tiers: `[B, H_kv, T]` of all tokens that have been sorted.
    """

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy
        self.score = TOKEN_SCORES.find(policy.score)()
        self.tiers = Buffer()
        self._attention = Tally()
        self._observers = Tally()
        self._latest: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return self.tiers.nbytes + self._attention.nbytes + self._observers.nbytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes held, with the room to grow."""
        return self.tiers.allocated_bytes + self._attention.nbytes + self._observers.nbytes

    def observe(self, rows: Rows) -> None:
        """Take in what queries give to the tokens of the tail."""
        self._attention.add(rows.weights, rows.is_sum)
        if rows.visible is not None:
            self._observers.add(rows.visible, rows.is_sum)

    def sort(self, keys: Tensor) -> Tensor:
        """Tiers `[B, H_kv, n]` uint8 of the oldest tokens of the tail; their keys are `[B, H_kv, n, D]`."""
        batch, heads, count, _ = keys.shape
        order = self.score.importance(self._candidates(keys)).argsort(dim=-1, descending=True, stable=True)
        *counts, evicted = self.policy.counts(count)
        sizes = torch.tensor([*counts, evicted], device=keys.device)
        names = torch.tensor([*range(len(counts)), EVICTED], dtype=torch.uint8, device=keys.device)
        in_order = names.repeat_interleave(sizes, output_size=count).expand(batch, heads, count)
        self._latest = torch.empty_like(order, dtype=torch.uint8).scatter_(-1, order, in_order)
        self.tiers.append(self._latest)
        return self._latest

    def sort_alike(self, values: Tensor) -> Tensor:
        """What `sort` has said of the keys of these tokens."""
        assert self._latest is not None and self._latest.shape[2] == values.shape[2]
        return self._latest

    def left(self, count: int) -> None:
        """The oldest `count` tokens have left the tail."""
        if count:
            self._attention.narrow(count)
            self._observers.narrow(count)
        self._latest = None

    def crop(self, count: int, tail: int, sorted_tokens: int) -> None:
        """The last `count` tokens were taken back, of which `tail` are left in the tail, and so many are sorted.

        Tokens that came back from tiers have nobody's attention yet.
        """
        if sorted_tokens < self.tiers.length:
            self.tiers.truncate(sorted_tokens)
            self._attention, self._observers = Tally(), Tally()
        for tally in (self._attention, self._observers):
            tally.take_back(count)
            tally.narrow(0, tail)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to everything held."""
        for part in (self.tiers, self._attention, self._observers):
            part.apply(change)

    def _candidates(self, keys: Tensor) -> Candidates:
        if not self.score.needs_queries:
            return Candidates(keys)
        observers = None if self.score.extrapolates else _oldest(self._observers, keys)
        return Candidates(keys, _oldest(self._attention, keys), observers)


def _oldest(tally: Tally, keys: Tensor) -> Tensor:
    """What is known about these tokens of the tail: nothing, of those that have come back from tiers."""
    total = tally.total
    return keys.new_zeros(keys.shape[:3], dtype=torch.float32) if total is None else total[..., : keys.shape[2]]
