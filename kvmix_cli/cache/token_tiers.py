"""The tiers of one layer's tokens, chosen once, when tokens leave the window; keys and values alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from kvmix_kernels.segments import EVICTED
from torch import Tensor

from ..plan.policies import TokenPolicy
from .archive import Archive
from .buffer import Buffer
from .observation import AttentionCall, QuerySample, TailAttention
from .policies import TOKEN_SCORES, Candidates
from .store import Store


class TokenChoice(ABC):
    """What a token policy decides about the tokens that leave the tail, and the statistics that it decides by.

    Attributes:
        attention: that the tokens in the tail have received.
        sorted: what is stored about tokens that have left the tail, shared by keys and values.
    """

    def __init__(self, policy: TokenPolicy) -> None:
        self.policy = policy
        self.score = TOKEN_SCORES[policy.score]()
        self.sorted = Buffer()
        self.attention = TailAttention(QuerySample(), self.score.extrapolates)
        self._arrived = 0
        self._prompt: int | None = None  # tokens of the prompt, once it has ended

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return self.sorted.nbytes + self.attention.nbytes

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return self.sorted.allocated_bytes + self.attention.nbytes

    @property
    def is_sorting(self) -> bool:
        """Return whether tokens that leave the tail now are sorted, and may be evicted."""
        return self.policy.when == "always" or self._prompt is None

    def arrive(self, count: int) -> None:
        """Note that a forward has brought `count` tokens; the first single one ends the prompt."""
        if count == 1 and self._arrived and self._prompt is None:
            self._prompt = self._arrived
        self._arrived += count

    def learn(self, call: AttentionCall, keys: Tensor, tokens: int, store: Store) -> None:
        """Add the attention that tokens receive from a call's queries.

        Args:
            call: the last of all tokens as queries.
            keys: `[B, H_kv, n, D]`, the last of them as stored.
            tokens: number of all tokens.
            store: of the layer's keys.
        """
        self.attention.learn(call, keys, tokens, store.tail_tokens)

    def forget_oldest(self, count: int) -> None:
        """Forget the statistics of the oldest `count` tokens, which have left the tail."""
        self.attention.forget_oldest(count)

    def crop(self, count: int, tail: int, packed: int) -> None:
        """Take the last `count` tokens back, so that `tail` are left in the tail and `packed` sorted.

        Tokens that come back from what is sorted start without attention.
        """
        self.attention.crop(count, tail, reopened=packed < self.sorted_tokens)
        self._arrived -= count
        if self._prompt is not None and self._arrived <= self._prompt:
            self._prompt = None

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to everything held."""
        self.sorted.apply(change)
        self.attention.apply(change)

    def exchange(self, archive: Archive, tokens: int) -> None:
        """Give everything about the `tokens` that have left the tail to an archive, and the statistics, or take it."""
        self.attention.exchange(archive.part("attention"))
        if self.policy.when == "prompt":
            self._arrived = archive.tokens
            self._prompt = archive.number("prompt", self._prompt or 0) or None

    @property
    @abstractmethod
    def sorted_tokens(self) -> int:
        """Return the number of tokens that have left the tail."""

    def _importance(self, keys: Tensor) -> Tensor:
        """Return the importance `[B, H_kv, n]` of the tail's oldest tokens, of keys `[B, H_kv, n, D]`."""
        return self.score.importance(self._candidates(keys))

    def _candidates(self, keys: Tensor) -> Candidates:
        if not self.score.needs_queries:
            return Candidates(keys)
        count = keys.shape[2]
        weights, observers = self.attention.received(count), self.attention.observers(count)
        nothing = keys.new_zeros(keys.shape[:3], dtype=torch.float32)  # tokens that have come back from tiers
        if self.score.extrapolates:
            return Candidates(keys, nothing if weights is None else weights)
        return Candidates(keys, *(nothing if each is None else each for each in (weights, observers)))


class TokenTiers(TokenChoice):
    """Tiers by shares; `sorted` is `[B, H_kv, T]` uint8, the tier of every token that has left the tail."""

    def __init__(self, policy: TokenPolicy) -> None:
        super().__init__(policy)
        self._latest: Tensor | None = None

    @property
    def sorted_tokens(self) -> int:
        return self.sorted.length

    def choose(self, keys: Tensor) -> Tensor:
        """Choose and return the tiers `[B, H_kv, n]` uint8 of the tail's oldest tokens, of keys `[B, H_kv, n, D]`."""
        batch, heads, count, _ = keys.shape
        *counts, evicted = self.policy.counts(count)
        if not self.is_sorting:
            own = torch.tensor(len(counts) - 1, dtype=torch.uint8, device=keys.device)
            self._latest = own.expand(batch, heads, count)
        else:
            order = self._importance(keys).argsort(dim=-1, descending=True, stable=True)
            sizes = torch.tensor([*counts, evicted], device=keys.device)
            numbers = torch.tensor([*range(len(counts)), EVICTED], dtype=torch.uint8, device=keys.device)
            in_order = numbers.repeat_interleave(sizes, output_size=count).expand(batch, heads, count)
            self._latest = torch.empty_like(order, dtype=torch.uint8).scatter_(-1, order, in_order)
        self.sorted.append(self._latest)
        return self._latest

    def chosen_for_keys(self, values: Tensor) -> Tensor:
        """Return the tiers that `choose` has just chosen for the keys of these tokens."""
        if self._latest is None or self._latest.shape[2] != values.shape[2]:
            raise AssertionError("values leave the tail right after the keys of the same tokens")
        return self._latest

    def forget_oldest(self, count: int) -> None:
        """Forget the statistics of the oldest `count` tokens, which have left the tail."""
        super().forget_oldest(count)
        self._latest = None

    def crop(self, count: int, tail: int, packed: int) -> None:
        """Take the last `count` tokens back; see `TokenChoice.crop`."""
        super().crop(count, tail, packed)
        self.sorted.truncate(packed)

    def exchange(self, archive: Archive, tokens: int) -> None:
        """Give the tiers of all `tokens` that have left the tail to an archive, and the statistics, or take them."""
        archive.buffer("tiers", self.sorted, (*archive.rows, tokens), torch.uint8)
        super().exchange(archive, tokens)
