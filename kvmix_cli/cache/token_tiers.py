"""The tiers of one layer's tokens, chosen once, when tokens leave the window; keys and values alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from kvmix_kernels.segments import EVICTED
from torch import Tensor

from ..plan.moments import Rope
from ..plan.policies import TokenPolicy
from .archive import Archive
from .buffer import Buffer, lasting
from .observation import AttentionCall, QuerySample, TailAttention
from .policies import Candidates, TokenScore, token_score
from .policies.tokens import SAMPLED_QUERIES, at_positions
from .store import ROLLBACK


class TokenTiers:
    """The statistics of the tokens in the tail, and the tiers of those that have left it.

    Args:
        policy: of the plan.
        layer: index of the layer.
        rope: its rotary positions, if the score reads keys before RoPE.

    Attributes:
        attention: that the tokens in the tail have received.
        tiers: `[B, H_kv, T]` uint8, the tier of every token that has left the tail.
    """

    def __init__(self, policy: TokenPolicy, layer: int = 0, rope: Rope | None = None) -> None:
        self.policy = policy
        self.score = token_score(policy.score)
        self.tiers = Buffer()
        last = self.score.last if self.score.queries == "last" else 0
        self.attention = TailAttention(_sample(self.score), self.score.extrapolates, self.score.reduce, last)
        self._layer = layer
        self._rope = rope
        self._queries: Tensor | None = None  # [B, H_kv, R, D], of the prompt, before RoPE
        self._scaling = 1.0
        self._latest: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return self.tiers.nbytes + self._statistic_bytes

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, room to grow included."""
        return self.tiers.allocated_bytes + self._statistic_bytes

    @property
    def _statistic_bytes(self) -> int:
        return self.attention.nbytes + (0 if self._queries is None else self._queries.nbytes)

    def learn(self, call: AttentionCall, keys: Tensor, tokens: int, tail: int) -> None:
        """Add what the score declares of a forward's queries; see `TailAttention.learn`."""
        if self.score.weighs:
            self.attention.learn(call, keys, tokens, tail)
        elif self.score.queries == "prompt" and self._queries is None:
            self._keep_queries(call, keys.shape[1], tokens)

    @lasting
    def _keep_queries(self, call: AttentionCall, kv_heads: int, tokens: int) -> None:
        """Keep queries of a prompt, as the model made them: of all heads of a group, spread evenly over its tokens."""
        grouped = call.query.unflatten(1, (kv_heads, -1))
        count = min(max(1, SAMPLED_QUERIES // grouped.shape[2]), grouped.shape[3])
        rows = torch.linspace(0, grouped.shape[3] - 1, count, device=grouped.device).round().long()
        places = tokens - grouped.shape[3] + rows
        self._queries = at_positions(grouped.index_select(3, rows), self._rope, -places).flatten(2, 3).float()
        self._scaling = call.scaling

    def choose(self, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """Choose and return the tiers `[B, H_kv, n]` uint8 of the tail's oldest tokens.

        Args:
            keys: `[B, H_kv, n, D]`, as the model made them.
            values: `[B, H_kv, n, D_v]`, likewise.
            start: place of the first.
        """
        batch, heads, count, _ = keys.shape
        ranking = self.score.ranking(self._candidates(keys, values, start), self.policy.granularity)
        order = ranking.argsort(dim=-1, descending=True, stable=True)
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
        self._apply_to_queries(change)

    @lasting
    def _apply_to_queries(self, change: Callable[[Tensor], Tensor]) -> None:
        self._queries = None if self._queries is None else change(self._queries)

    def exchange(self, archive: Archive, tokens: int) -> None:
        """Give the tiers of all `tokens` that have left the tail to an archive, and the statistics, or take them."""
        archive.buffer("tiers", self.tiers, (*archive.rows, tokens), torch.uint8)
        self.attention.exchange(archive.part("attention"))
        if self.score.queries == "prompt":
            shape = (*archive.rows, None, archive.example.shape[3])
            self._queries = archive.tensor("queries", self._queries, shape, torch.float32)
            self._scaling = float(archive.fact("scaling", self._scaling))

    def _candidates(self, keys: Tensor, values: Tensor, start: int) -> Candidates:
        count = keys.shape[2]
        *_, own, evicted = self.policy.counts(count)
        candidates = Candidates(
            keys,
            values,
            start,
            self._layer,
            count - evicted if evicted else count - own,
            queries=self._queries,
            scaling=self._scaling,
            rope=self._rope,
        )
        if not self.score.weighs:
            return candidates
        nothing = keys.new_zeros(keys.shape[:3], dtype=torch.float32)  # tokens that have come back from tiers
        weights, observers = self.attention.received(count), self.attention.observers(count)
        seen = None if self.score.extrapolates else nothing if observers is None else observers
        return replace(candidates, attention=nothing if weights is None else weights, observers=seen)


def _sample(score: TokenScore) -> QuerySample:
    """Return the queries of a forward that a score looks at."""
    if score.queries == "last":
        return QuerySample(recent=max(score.last, ROLLBACK), spread=0)
    return QuerySample(every=score.queries == "all")
