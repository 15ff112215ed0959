"""Scores of tokens that leave the window together, by importance, one small class for each method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import PlanError
from ...registry import Registry


@dataclass(frozen=True)
class Candidates:
    """Tokens whose tiers are to be chosen.

    Attributes:
        keys: `[B, H_kv, n, D]`, as they are stored.
        attention: `[B, H_kv, n]`, weights received from queries so far, summed over the query heads of a group; None
            for a score that needs no queries.
        observers: `[B, 1, n]`, number of queries that could see them; None for a score that extrapolates.
    """

    keys: Tensor
    attention: Tensor | None = None
    observers: Tensor | None = None


class TokenScore:
    """A score of tokens: subclass it, and register the subclass in `TOKEN_SCORES`; see docs/add-a-method.md.

    Attributes:
        needs_queries: the score reads `attention`, so the model must attend through kvmix.
        extrapolates: sampled queries of a prompt represent those that are not sampled.
        counts_places: importance is the place among the tokens that are scored together; later ones are added to it.
    """

    needs_queries: ClassVar[bool] = True
    extrapolates: ClassVar[bool] = True
    counts_places: ClassVar[bool] = False

    def importance(self, tokens: Candidates) -> Tensor:
        """Return `[B, H_kv, n]`; more is more important."""
        raise NotImplementedError


TOKEN_SCORES: Registry[type[TokenScore]] = Registry("token score", PlanError)


@TOKEN_SCORES.register("attention")
class AccumulatedAttention(TokenScore):
    """Attention that a token has received, `S_i = sum_t softmax(q_t K / sqrt d)_i`.

    After H2O (arXiv 2306.14048, section 4) and MiKV (arXiv 2402.18096, section 3). Differs from both: a prompt's sum is
    estimated from a sample of its queries, and a token's tier is chosen once, when it leaves the window, instead of at
    every step.
    """

    def importance(self, tokens: Candidates) -> Tensor:
        if tokens.attention is None:
            raise AssertionError("the score `attention` needs attention")
        return tokens.attention


@TOKEN_SCORES.register("normalised")
class NormalisedAttention(TokenScore):
    """Attention that a token has received from each query that could see it (ZipCache, arXiv 2405.14256, section 4.2).

    An accumulated sum favours the tokens that have been there longest.
    """

    extrapolates = False

    def importance(self, tokens: Candidates) -> Tensor:
        if tokens.attention is None or tokens.observers is None:
            raise AssertionError("the score `normalised` needs attention and the number of observers")
        return tokens.attention / tokens.observers.clamp(min=1)


@TOKEN_SCORES.register("recency")
class Recency(TokenScore):
    """Position: later tokens are more important, as in a second window in a lower precision."""

    needs_queries = False
    counts_places = True

    def importance(self, tokens: Candidates) -> Tensor:
        places = tokens.keys.new_ones(tokens.keys.shape[:3])
        return places.cumsum(-1)
