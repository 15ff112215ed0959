"""Decisions of a token policy about one layer's tokens as they leave its window, and the statistics behind them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...plan.tensors.moments import Rope
from ...plan.tokens import TokenPolicy
from ..archive import Archive
from ..buffer import Buffer, lasting
from ..observation import AttentionCall, QuerySample, TailAttention
from ..policies import Candidates, TokenScore, token_score
from ..policies.tokens import SAMPLED_QUERIES, at_positions
from ..store import ROLLBACK, Store


class TokenChoice(ABC):
    """The decisions of a token policy about tokens that leave the tail, and the statistics that they rest on.

    Args:
        policy: of the plan.
        layer: index of the layer.
        rope: its rotary positions, if the score reads keys before RoPE.

    Attributes:
        attention: that the tokens in the tail have received.
        sorted: what is stored about tokens that have left the tail, shared by keys and values.
    """

    def __init__(self, policy: TokenPolicy, layer: int = 0, rope: Rope | None = None) -> None:
        self.policy = policy
        self.score = token_score(policy.score)
        self.sorted = Buffer()
        self.attention = TailAttention(sample_of(self.score), self.score.extrapolates, self.score.reduce, self._last)
        self._layer = layer
        self._rope = rope
        self._queries: Tensor | None = None  # [B, H_kv, R, D], of the prompt, before RoPE
        self._scaling = 1.0
        self._arrived = 0
        self._prompt: int | None = None  # tokens of the prompt, once it has ended

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return self.sorted.nbytes + self._statistic_bytes

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return self.sorted.allocated_bytes + self._statistic_bytes

    @property
    def needs_queries(self) -> bool:
        """Return whether the model must show its queries."""
        return self.score.needs_queries

    @property
    def is_sorting(self) -> bool:
        """Return whether tokens that leave the tail now are sorted, and may be evicted."""
        return self.policy.when == "always" or self._prompt is None

    @property
    @abstractmethod
    def sorted_tokens(self) -> int:
        """Return the number of tokens that have left the tail."""

    def arrive(self, count: int) -> None:
        """Note that a forward has brought `count` tokens; the first single one ends the prompt."""
        if count == 1 and self._arrived and self._prompt is None:
            self._prompt = self._arrived
        self._arrived += count

    def learn(self, call: AttentionCall, keys: Tensor, tokens: int, store: Store) -> None:
        """Add what the score declares of a forward's queries.

        Args:
            call: with the last of all tokens as queries.
            keys: `[B, H_kv, n, D]`, the last of them as stored.
            tokens: number of all tokens.
            store: of the layer's keys.
        """
        if self.score.weighs:
            self.attention.learn(call, keys, tokens, store.tail_tokens)
        elif self.score.queries == "prompt" and self._queries is None:
            self._keep_queries(call, keys.shape[1], tokens)

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
        self._apply_to_queries(change)

    def exchange(self, archive: Archive, tokens: int) -> None:
        """Give everything about the `tokens` that have left the tail to an archive, and the statistics, or take it."""
        self.attention.exchange(archive.part("attention"))
        if self.score.queries == "prompt":
            shape = (*archive.rows, None, archive.example.shape[3])
            self._queries = archive.tensor("queries", self._queries, shape, torch.float32)
            self._scaling = float(archive.fact("scaling", self._scaling))
        self._arrived = archive.tokens
        if self.policy.when == "prompt":
            self._prompt = archive.number("prompt", self._prompt or 0) or None

    @property
    def _statistic_bytes(self) -> int:
        return self.attention.nbytes + (0 if self._queries is None else self._queries.nbytes)

    @property
    def _last(self) -> int:
        """Return how many of the last queries count; 0 for all."""
        return self.score.last if self.score.queries == "last" else 0

    def _candidates(self, keys: Tensor, values: Tensor, start: int, kept: int) -> Candidates:
        """Return the tail's oldest tokens, as the model made them, for the score.

        Args:
            start: place of the first.
            kept: how many are going to be kept.
        """
        queries, scaling, rope = self._queries, self._scaling, self._rope
        candidates = Candidates(keys, values, start, self._layer, kept, queries=queries, scaling=scaling, rope=rope)
        if not self.score.weighs:
            return candidates
        count = keys.shape[2]
        nothing = keys.new_zeros(keys.shape[:3], dtype=torch.float32)  # tokens that have come back from tiers
        weights, observers = self.attention.received(count), self.attention.observers(count)
        seen = None if self.score.extrapolates else nothing if observers is None else observers
        return replace(candidates, attention=nothing if weights is None else weights, observers=seen)

    @lasting
    def _keep_queries(self, call: AttentionCall, kv_heads: int, tokens: int) -> None:
        """Keep queries of a prompt, as the model made them: of all heads of a group, spread evenly over its tokens."""
        grouped = call.query.unflatten(1, (kv_heads, -1))
        count = min(max(1, SAMPLED_QUERIES // grouped.shape[2]), grouped.shape[3])
        rows = torch.linspace(0, grouped.shape[3] - 1, count, device=grouped.device).round().long()
        places = tokens - grouped.shape[3] + rows
        self._queries = at_positions(grouped.index_select(3, rows), self._rope, -places).flatten(2, 3).float()
        self._scaling = call.scaling

    @lasting
    def _apply_to_queries(self, change: Callable[[Tensor], Tensor]) -> None:
        self._queries = None if self._queries is None else change(self._queries)


def sample_of(score: TokenScore) -> QuerySample:
    """Return the queries of a forward that a score looks at."""
    if score.queries == "last":
        return QuerySample(recent=max(score.last, ROLLBACK), spread=0)
    return QuerySample(every=score.queries == "all")
