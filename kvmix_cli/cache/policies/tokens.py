"""What a score of tokens declares and reads: tokens that leave the window together, by importance.

A score is a small class: class attributes declare which queries it looks at, and `importance` is its formula. The files
beside this one have the scores: `attended.py` by attention received, `keys.py` by the geometry of keys, `queries.py` by
the queries that are to come, `places.py` by place alone, and `presses.py` those of kvpress.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ...errors import PlanError, PolicyError
from ...plan.tensors.moments import Rope
from ...plan.token_scores import WaitingStatistics, declare
from ...registry import Registry
from ..rotary import turned
from ..statistics import Reduction

SAMPLED_QUERIES = 64
"""Queries of a prompt that each KV head keeps for a score that reads queries themselves."""


@dataclass(frozen=True)
class Candidates:
    """Tokens whose tiers are to be chosen.

    Attributes:
        keys: `[B, H_kv, n, D]`, as the model made them: after RoPE, before transforms of the cache.
        values: `[B, H_kv, n, D_v]`, likewise.
        start: place of the first token in the cache; the others follow it.
        layer: index of the layer.
        kept: number of tokens, of each KV head, that are going to be kept: in tiers, or if some are evicted, at all.
        attention: `[B, H_kv, n]`, weights received from queries so far, reduced as the score declares; None for a score
            that looks at no queries.
        observers: `[B, 1, n]`, number of queries that could see them; None for a score that extrapolates.
        queries: `[B, H_kv, R, D]`, a sample of the prompt's queries, before RoPE; None unless the score asks for them.
        scaling: factor on `q·k`.
        rope: rotary positions of the layer; None where there are none, or no score reads keys before RoPE.
    """

    keys: Tensor
    values: Tensor
    start: int = 0
    layer: int = 0
    kept: int = 0
    attention: Tensor | None = None
    observers: Tensor | None = None
    queries: Tensor | None = None
    scaling: float = 1.0
    rope: Rope | None = None

    @property
    def received(self) -> Tensor:
        """Return the attention, which a score that declares queries always has."""
        if self.attention is None:
            raise AssertionError("this score looks at no queries, so its tokens have no attention")
        return self.attention

    @property
    def places(self) -> Tensor:
        """Return the places of the tokens in the cache, `[n]` int64."""
        return torch.arange(self.start, self.start + self.keys.shape[2], device=self.keys.device)

    @cached_property
    def keys_before_rope(self) -> Tensor:
        """Return the keys `[B, H_kv, n, D]` without their rotary positions, float32 or float64.

        Places are taken for positions. With left padding they differ by one number a sequence: all of its keys are then
        turned by the same angle, which changes no product, norm or cosine of two of them.
        """
        return at_positions(self.keys, self.rope, -self.places)


def at_positions(states: Tensor, rope: Rope | None, positions: Tensor) -> Tensor:
    """Return states `[..., n, D]` turned by rotary positions `[n]`, float32 or float64; as they are without any."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return wide if rope is None else turned(wide, rope, positions)


class TokenScore:
    """A score of tokens: subclass it, and register the subclass in `TOKEN_SCORES`; see docs/add-a-method.md.

    Attributes:
        queries: those that `attention` is of: a `sample` of a prompt's and all that are decoded, the `last` ones only,
            `all`, or `none`; any but `none` needs a model that attends through kvmix. `prompt` is a sample of the
            prompt's queries themselves, in `Candidates.queries`, and no attention.
        last: how many are the last.
        reduce: weights of all queries that read a KV head are summed, or their maximum is taken.
        extrapolates: sampled queries of a prompt represent those that are not sampled.
        pool: each token gets the mean, or the maximum, of the scores of so many neighbours, itself in the middle.
        heads: each KV head sorts tokens by its own scores, or all by the mean of theirs.
        before_rope: it reads `Candidates.keys_before_rope` or `queries`, so that the model's rotary positions must be
            known; `load_model` makes them so.
        follows: a kept token goes on being scored by the attention that it receives, under a token budget.
        waits: a prompt waits unpacked until `decoding/prompt_scores.py` has scored it; later tokens are scored by
            the attention that they have received.
    """

    queries: ClassVar[Literal["none", "sample", "last", "all", "prompt"]] = "sample"
    last: ClassVar[int] = 32
    reduce: ClassVar[Reduction] = "sum"
    extrapolates: ClassVar[bool] = True
    pool: ClassVar[tuple[Literal["mean", "max"], int] | None] = None
    heads: ClassVar[Literal["own", "shared"]] = "own"
    before_rope: ClassVar[bool] = False
    follows: ClassVar[bool] = False
    waits: ClassVar[bool] = False

    def importance(self, tokens: Candidates) -> Tensor:
        """Return `[B, H_kv, n]`, more is more important: the attention received, unless a score overrides it."""
        return tokens.received

    @property
    def needs_queries(self) -> bool:
        """Return whether the model must show its queries."""
        return self.queries != "none"

    @property
    def weighs(self) -> bool:
        """Return whether the attention that tokens receive is kept."""
        return self.statistics().weighs

    @classmethod
    def statistics(cls) -> WaitingStatistics:
        """Return what is kept of waiting tokens, as the count of bytes knows it."""
        return WaitingStatistics(
            weighs=cls.queries not in ("none", "prompt"),
            last=cls.last if cls.queries == "last" else 0,
            counts=not cls.extrapolates,
            follows=cls.follows,
            queries=SAMPLED_QUERIES if cls.queries == "prompt" else 0,
        )

    def ranking(self, tokens: Candidates, granularity: int = 1) -> Tensor:
        """Return the scores `[B, H_kv, n]` that tokens are sorted by: pooled, shared and averaged as declared.

        Args:
            granularity: neighbouring tokens that are sorted together, by their mean; a divisor of `n`.

        Raises:
            PolicyError: if `importance` returns another shape, or NaN.
        """
        scores = self.importance(tokens)
        if scores.shape != tokens.keys.shape[:3]:
            raise PolicyError(
                f"layer {tokens.layer}: the score {type(self).__name__} returned {list(scores.shape)}; "
                f"expected {list(tokens.keys.shape[:3])}, one number for each token of each KV head"
            )
        if scores.isnan().any():
            raise PolicyError(f"layer {tokens.layer}: the score {type(self).__name__} is NaN for some tokens")
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.pool is not None:
            kind, width = self.pool
            pooled = avg_pool1d if kind == "mean" else max_pool1d
            scores = pooled(scores, width, stride=1, padding=width // 2)[..., : scores.shape[2]]
        if self.heads == "shared":
            scores = scores.mean(1, keepdim=True).expand_as(scores)
        if granularity > 1:
            scores = scores.unflatten(2, (-1, granularity)).mean(3).repeat_interleave(granularity, dim=2)
        return scores


class _TokenScores(Registry[type[TokenScore]]):
    """Scores by name; what each keeps is declared to the count of bytes."""

    def add(self, name: str, entry: type[TokenScore] | str) -> None:
        """Register a class of scores. Raises ValueError if the name is taken."""
        super().add(name, entry)
        if not isinstance(entry, str):
            declare(name, entry.statistics())


TOKEN_SCORES: Registry[type[TokenScore]] = _TokenScores("token score", PlanError)
