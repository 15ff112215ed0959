"""The tiers of one layer's tokens, chosen once, when tokens leave the window; keys and values alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kvmix_kernels.segments import EVICTED
from torch import Tensor

from ..plan.policies import TokenPolicy
from .archive import Archive
from .buffer import Buffer
from .observation import QuerySample, TailAttention
from .policies import TOKEN_SCORES, Candidates


class TokenTiers:
    """The statistics of the tokens in the tail, and the tiers of those that have left it.

    Attributes:
        attention: that the tokens in the tail have received.
        tiers: `[B, H_kv, T]` uint8, the tier of every token that has left the tail.
    """

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy
        self.score = TOKEN_SCORES[policy.score]()
        self.tiers = Buffer()
        self.attention = TailAttention(QuerySample(), self.score.extrapolates)
        self._latest: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return self.tiers.nbytes + self.attention.nbytes

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return self.tiers.allocated_bytes + self.attention.nbytes

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
        self.attention.forget_oldest(count)
        self._latest = None

    def crop(self, count: int, tail: int, packed: int) -> None:
        """Take the last `count` tokens back, so that `tail` are left in the tail and `packed` in tiers.

        Tokens that come back from tiers start without attention.
        """
        self.attention.crop(count, tail, reopened=packed < self.tiers.length)
        self.tiers.truncate(packed)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to everything held."""
        self.tiers.apply(change)
        self.attention.apply(change)

    def exchange(self, archive: Archive, tokens: int) -> None:
        """Give the tiers of all `tokens` that have left the tail to an archive, and the statistics, or take them."""
        archive.buffer("tiers", self.tiers, (*archive.rows, tokens), torch.uint8)
        self.attention.exchange(archive.part("attention"))

    def _candidates(self, keys: Tensor) -> Candidates:
        if not self.score.needs_queries:
            return Candidates(keys)
        count = keys.shape[2]
        weights, observers = self.attention.received(count), self.attention.observers(count)
        nothing = keys.new_zeros(keys.shape[:3], dtype=torch.float32)  # tokens that have come back from tiers
        if self.score.extrapolates:
            return Candidates(keys, nothing if weights is None else weights)
        return Candidates(keys, *(nothing if each is None else each for each in (weights, observers)))
