"""Policies of tokens: important ones are stored in tiers wider than their layer's bits, others may be dropped.

A token in no tier is stored at its layer's own bits, so a policy combines with every plan. `cache/policies` and
`cache/packing` implement them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal

from pydantic import Field, field_validator, model_validator

from .document.fields import MOST_TOKENS, PolicySetting, Several, Share, known_width
from .token_scores import WaitingStatistics, statistics_of

LayerMeasure = Literal["variance", "sparsity", "mass"]
"""A number that a prompt's attention has in each layer."""


class Tier(PolicySetting):
    """A share of the tokens, and the bits of their keys and values; a layer with more bits keeps its own."""

    share: float = Field(gt=0, lt=1)
    k: int
    v: int

    _widths = field_validator("k", "v")(known_width)


class TokenPolicy(PolicySetting):
    """A sorting of tokens into tiers by importance, once, when `flush` of them have left the window.

    With `keep`, a layer keeps a number of tokens instead of shares: whenever more have left the window, whole pages of
    the least important ones are dropped, also of those that were kept before.

    Attributes:
        score: measure of importance, a name of `cache/policies`, or a score of kvpress, `press:SnapKVPress()`.
        tiers: tiers, the most important tokens first. The remaining tokens have the layer's own bits.
        evict: share of the least important tokens, which are dropped.
        sure: part of the mean that every KV head of a layer keeps whatever its scores; the rest of what the layer keeps
            goes to the heads that have the best tokens, in whole pages. None: all heads keep equally many.
        by_layer: measure of a prompt's attention by which layers share out what they keep together, or have in their
            tier, a name of `cache/policies/layers.py`; None: what the plan says of each layer.
        merge: rule by which tokens that are dropped go into tokens that stay, a name of `cache/merging`; None for none.
        weigh: a token at the layer's own bits counts for those that are dropped, too, in the softmax of attention.
        images: tokens of an image come before, or after, all others in the order, whatever their scores; None for
            alike. A cache is told which they are, `MixedCache.label`.
        keep: tokens that a layer keeps, sinks and window included; None for shares.
        when: tokens that are sorted and dropped: all, or only those of the prompt, which ends at the first forward of
            a single token. Later ones have the layer's own bits.
        flush: tokens that are sorted together; a long prompt is sorted as a whole.
        granularity: neighbouring tokens, a chunk, that share one place in the order: that of their mean score.
    """

    score: str = "attention"
    tiers: Several[Tier] = ()
    evict: float = Field(default=0.0, ge=0, lt=1)
    sure: float | None = Field(default=None, ge=0, le=1)
    by_layer: LayerMeasure | None = None
    merge: str | None = None
    weigh: bool = False
    images: Literal["first", "last"] | None = None
    keep: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    when: Literal["always", "prompt"] = "always"
    flush: int = Field(default=320, ge=16, le=MOST_TOKENS)
    granularity: int = Field(default=1, ge=1, le=MOST_TOKENS)

    @model_validator(mode="after")
    def _adds_up(self) -> TokenPolicy:
        if self.keep is not None:
            if self.tiers or self.evict:
                raise ValueError("a number of tokens to keep goes with neither tiers nor evict; leave these out")
            return self
        if not self.tiers and not self.evict:
            raise ValueError("a token policy needs tiers, a share of tokens to evict, or a number to keep")
        if self.shares[-2] <= 0:
            claimed = ", ".join(f"{tier.share:g}" for tier in self.tiers)
            raise ValueError(f"shares {claimed} and {self.evict:g} to evict leave nothing for the layer's own bits")
        return self

    @model_validator(mode="after")
    def _shares_among_heads(self) -> TokenPolicy:
        if self.sure is None:
            return self
        if not self.evict:
            raise ValueError("sure is of a share of tokens that are dropped; add evict, without keep")
        if others := [name for name in ("tiers", "merge", "weigh") if getattr(self, name)]:
            raise ValueError(
                f"KV heads that keep different numbers of tokens (sure) have no {' and no '.join(others)}; "
                "leave one of both out"
            )
        return self

    @model_validator(mode="after")
    def _shares_among_layers(self) -> TokenPolicy:
        if self.by_layer is not None and (self.weigh or len(self.tiers) + bool(self.evict) != 1):
            raise ValueError(
                f"by_layer: {self.by_layer} shares out one number among layers: evict, or a single tier, without keep "
                "and weigh"
            )
        return self

    @model_validator(mode="after")
    def _merges_what_it_drops(self) -> TokenPolicy:
        if self.merge is not None and not self.evict:
            raise ValueError(f"merge: {self.merge} is of a share of tokens that are dropped; add evict, without keep")
        if self.images is not None and self.keep is not None:
            raise ValueError("images come first or last in an order of shares; leave out keep")
        if self.weigh and (not self.evict or self.when == "prompt"):
            raise ValueError(
                "weigh is of a share that is dropped of all tokens; add evict, without keep and when: prompt"
            )
        return self

    def of_layer(self, own: TokenShares) -> TokenPolicy | None:
        """Return this policy with what a layer has of its own; None if the layer then sorts and drops nothing.

        Raises:
            ValueError: if the layer's shares do not fit the policy, or leave nothing for the layer's own bits.
        """
        if self.keep is not None or own.keep is not None:
            return self._with_keep(own)
        shares = tuple(tier.share for tier in self.tiers) if own.tiers is None else own.tiers
        if len(shares) != len(self.tiers):
            raise ValueError(f"tiers must be {len(self.tiers)} shares, as cache.tokens has tiers, got {len(shares)}")
        pairs = zip(self.tiers, shares, strict=True)
        tiers = tuple(tier.model_copy(update={"share": share}) for tier, share in pairs if share)
        evict = self.evict if own.evict is None else own.evict
        if not tiers and not evict:
            return None
        given = {**self.model_dump(), "tiers": tiers, "evict": evict}
        given |= {} if evict else {"merge": None, "weigh": False, "sure": None}
        return TokenPolicy.model_validate(given)

    def _with_keep(self, own: TokenShares) -> TokenPolicy | None:
        """Return this policy with a layer's own number of tokens to keep; None for `evict: 0`, which keeps all."""
        if own.keep is not None and self.keep is not None:
            return self.model_copy(update={"keep": own.keep})
        if own.evict == 0 and own.tiers is None:
            return None
        if self.keep is None:
            raise ValueError("cache.tokens has shares, not a number of tokens to keep, which a layer could change")
        raise ValueError("cache.tokens has a number of tokens to keep: a layer may have another keep, or evict: 0")

    @property
    def statistics(self) -> WaitingStatistics:
        """Return what the score keeps of tokens that wait to be sorted."""
        return statistics_of(self.score)

    @property
    def evicts(self) -> bool:
        """Return whether tokens are dropped."""
        return bool(self.evict) or self.keep is not None

    @property
    def log_weight(self) -> float:
        """Return the logarithm of the number of tokens that one at the layer's own bits counts for."""
        own, evicted = self.shares[-2:]
        return math.log(1 + evicted / own) if self.weigh else 0.0

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """Return the shares of tokens in each tier, at the layer's own bits, and evicted; they add up to 1."""
        tiers = [Fraction(tier.share).limit_denominator(10_000) for tier in self.tiers]
        evicted = Fraction(self.evict).limit_denominator(10_000)
        return (*tiers, 1 - sum(tiers) - evicted, evicted)

    def counts(self, tokens: int) -> tuple[int, ...]:
        """Return how many of `tokens`, a multiple of `flush`, are in each tier, at the layer's bits, and evicted."""
        return tuple(int(share * tokens) for share in self.shares)

    def faults(self, page: int) -> Iterator[str]:
        """Yield why tiers cannot be whole pages of `page` tokens."""
        if self.flush % page:
            yield f"flush must be a multiple of the page of {page} tokens, got {self.flush}"
        elif any((share * self.flush) % page for share in self.shares):
            candidates = range(page, 513 * page, page)
            least = next((size for size in candidates if not any((s * size) % page for s in self.shares)), None)
            advice = f"; use a flush of {least}" if least else ""
            yield f"shares of a flush of {self.flush} tokens are not whole pages of {page}{advice}"
        if page % self.granularity:
            yield f"granularity must be a divisor of the page of {page} tokens, got {self.granularity}"


class TokenShares(PolicySetting):
    """The part of a plan's token policy that one layer, or a group of its heads, has of its own.

    Attributes:
        tiers: share of each of the policy's tiers, in their order; None for the policy's own.
        evict: share of the least important tokens, which are dropped; None for the policy's own.
        keep: tokens that are kept, sinks and window included; None for the policy's own.
    """

    tiers: Several[Share] | None = None
    evict: Share | None = None
    keep: int | None = Field(default=None, ge=0, le=MOST_TOKENS)

    @model_validator(mode="after")
    def _says_something(self) -> TokenShares:
        if self.keep is not None and not (self.tiers is None and self.evict is None):
            raise ValueError("a number of tokens to keep goes with neither tiers nor evict; leave these out")
        if self.tiers is None and self.evict is None and self.keep is None:
            raise ValueError("a layer's tokens need shares of tiers, a share to evict, or a number to keep")
        return self
