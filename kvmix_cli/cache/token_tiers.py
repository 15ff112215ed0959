"""The tiers of one layer's tokens, chosen once, when tokens leave the window; keys and values alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kvmix_kernels.segments import EVICTED
from torch import Tensor

from ..plan.policies import TokenPolicy
from .buffer import Buffer
from .observation import QuerySum, WeightRows
from .policies import TOKEN_SCORES, Candidates


class TokenTiers:
    """The statistics of the tokens in the tail, and the tiers of those that have left it.

    Attributes:
        tiers: `[B, H_kv, T]` uint8, the tier of every token that has left the tail.
    """

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy
        self.score = TOKEN_SCORES[policy.score]()
        self.tiers = Buffer()
        self._attention = QuerySum()
        self._observers = QuerySum()
        self._latest: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return self.tiers.nbytes + self._attention.nbytes + self._observers.nbytes

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return self.tiers.allocated_bytes + self._attention.nbytes + self._observers.nbytes

    def observe(self, rows: WeightRows) -> None:
        """Add the weights that queries give to the tokens of the tail."""
        self._attention.add(rows.weights, rows.is_sum)
        if rows.visible is not None:
            self._observers.add(rows.visible, rows.is_sum)

    def choose(self, keys: Tensor) -> Tensor:
        """Choose and return the tiers `[B, H_kv, n]` uint8 of the tail's oldest tokens, of keys `[B, H_kv, n, D]`."""
        batch, heads, count, _ = keys.shape
        order = self.score.importance(self._candidates(keys)).argsort(dim=-1, descending=True, stable=True)
        *counts, evicted = self.policy.counts(count)
        sizes = torch.tensor([*counts, evicted], device=keys.device)
        numbers = torch.tensor([*range(len(counts)), EVICTED], dtype=torch.uint8, device=keys.device)
        in_order = numbers.repeat_interleave(sizes, output_size=count).expand(batch, heads, count)
        self._latest = torch.empty_like(order, dtype=torch.uint8).scatter_(-1, order, in_order)
        self.tiers.append(self._latest)
        return self._latest

    def chosen_for_keys(self, values: Tensor) -> Tensor:
        """Return the tiers that `choose` has just chosen for the keys of these tokens."""
        if self._latest is None or self._latest.shape[2] != values.shape[2]:
            raise AssertionError("values leave the tail right after the keys of the same tokens")
        return self._latest

    def forget_oldest(self, count: int) -> None:
        """Forget the statistics of the oldest `count` tokens, which have left the tail."""
        if count:
            self._attention.narrow(count)
            self._observers.narrow(count)
        self._latest = None

    def crop(self, count: int, tail: int, packed: int) -> None:
        """Take the last `count` tokens back, so that `tail` are left in the tail and `packed` in tiers.

        Tokens that come back from tiers start without attention.
        """
        if packed < self.tiers.length:
            self.tiers.truncate(packed)
            self._attention, self._observers = QuerySum(), QuerySum()
        for part in (self._attention, self._observers):
            part.take_back(count)
            part.narrow(0, tail)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to everything held."""
        for part in (self.tiers, self._attention, self._observers):
            part.apply(change)

    def _candidates(self, keys: Tensor) -> Candidates:
        if not self.score.needs_queries:
            return Candidates(keys)
        observers = None if self.score.extrapolates else _oldest(self._observers, keys)
        return Candidates(keys, _oldest(self._attention, keys), observers)


def _oldest(queries: QuerySum, keys: Tensor) -> Tensor:
    """Return the sums of the tokens whose keys are given; 0 for those that have come back from tiers."""
    total = queries.total
    return keys.new_zeros(keys.shape[:3], dtype=torch.float32) if total is None else total[..., : keys.shape[2]]
