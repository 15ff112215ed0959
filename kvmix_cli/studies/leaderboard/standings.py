"""Standings at equal stored bits: paired differences of losses, and rank correlations with predicted losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from ...evaluation.bootstrap import ratio
from ...evaluation.records import PerplexityRecord
from ...evaluation.results import Estimate, Row
from ...plan import Plan

LOSS = "loss_increase"
MIN_PLANS = 3
"""Plans below which a rank correlation has no meaning."""


@dataclass(frozen=True)
class Standing:
    """A measured plan at one budget.

    Attributes:
        names: the candidates that decided this plan.
        rows: measurements by task.
        predicted: predicted loss by score, in nats per token.
    """

    stored_bits: float
    names: tuple[str, ...]
    plan: Plan
    rows: Mapping[str, Row]
    predicted: Mapping[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> Estimate | None:
        """Return the measured increase of the loss, in nats per token; None if it could not be measured."""
        return self.rows["perplexity"].metrics.get(LOSS)


@dataclass(frozen=True)
class Comparison:
    """Losses of two candidates at one budget.

    Attributes:
        difference: first loss minus second, in nats per token, over the same documents; below 0 the first is better.
        ratio: first loss increase divided by the second; None if the second loses nothing.
    """

    stored_bits: float
    first: str
    second: str
    difference: Estimate
    ratio: float | None


def compare(first: tuple[str, Standing], second: tuple[str, Standing], seed: int = 0) -> Comparison | None:
    """Compare two named standings of one budget, document by document; None if one of them has no loss."""
    (name, one), (other_name, other) = first, second
    if one.loss is None or other.loss is None:
        return None
    records, others = (cast("Sequence[PerplexityRecord]", each.rows["perplexity"].records) for each in (one, other))
    differences = [mine["nll"] - theirs["nll"] for mine, theirs in zip(records, others, strict=True)]
    share = one.loss.value / other.loss.value if other.loss.value > 0 else None
    tokens = [record["tokens"] for record in records]
    return Comparison(one.stored_bits, name, other_name, ratio(differences, tokens, seed), share)


def rank_correlation(standings: Sequence[Standing], score: str) -> tuple[float | None, int]:
    """Return Spearman's correlation of predicted and measured loss, and the number of different plans.

    The correlation is None for fewer than three plans, and if all predictions or all losses are equal.
    """
    from scipy.stats import spearmanr

    pairs = {
        each.plan.sha256: (each.predicted[score], each.loss.value)
        for each in standings
        if score in each.predicted and each.loss is not None
    }
    if len(pairs) < MIN_PLANS or any(len(set(side)) == 1 for side in zip(*pairs.values(), strict=True)):
        return None, len(pairs)
    return float(spearmanr(*zip(*pairs.values(), strict=True)).statistic), len(pairs)
