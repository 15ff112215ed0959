"""How important a token is, among those that leave the window together. One small class a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .registry import Registry


@dataclass(frozen=True)
class Candidates:
    """Tokens that are to be sorted.

    Attributes:
        keys: `[B, H_kv, n, D]`, as they are stored.
        attention: `[B, H_kv, n]`, weights they have got from queries so far, summed over the query heads of a group;
            None for a score that looks at no queries.
        observers: `[B, 1, n]`, query rows that could see them.
    """

    keys: Tensor
    attention: Tensor | None = None
    observers: Tensor | None = None


class TokenScore:
    """Subclass, and register under a name; see docs/add-a-method.md.

    Attributes:
        needs_queries: it reads `attention`, so the model must attend through kvmix.
        extrapolates: rows of a prompt that are sampled stand for those that are not.
    """

    needs_queries: ClassVar[bool] = True
    extrapolates: ClassVar[bool] = True

    def importance(self, tokens: Candidates) -> Tensor:
        """`[B, H_kv, n]`; more is more important."""
        raise NotImplementedError


TOKEN_SCORES: Registry[type[TokenScore]] = Registry("token score")


@TOKEN_SCORES.register("attention")
class AccumulatedAttention(TokenScore):
    """Attention that a token has received, `S_i = sum_t softmax(q_t K / sqrt d)_i` (H2O, arXiv 2306.14048, section 4;
    MiKV, arXiv 2402.18096, section 3).

    Differs from both: a prompt's sum is estimated from a sample of its queries, and a token is sorted once, when it
    leaves the window, instead of at every step.
    """

    def importance(self, tokens: Candidates) -> Tensor:
        assert tokens.attention is not None
        return tokens.attention


@TOKEN_SCORES.register("normalised")
class NormalisedAttention(TokenScore):
    """Attention a token has received from each query that could see it (ZipCache, arXiv 2405.14256, section 4.2):
    an accumulated sum favours the tokens that have been there longest.
    """

    extrapolates = False

    def importance(self, tokens: Candidates) -> Tensor:
        assert tokens.attention is not None and tokens.observers is not None
        return tokens.attention / tokens.observers.clamp(min=1)


@TOKEN_SCORES.register("recency")
class Recency(TokenScore):
    """The later, the more important: a second window in a lower precision. Needs no queries."""

    needs_queries = False

    def importance(self, tokens: Candidates) -> Tensor:
        places = tokens.keys.new_ones(tokens.keys.shape[:3])
        return places.cumsum(-1)
