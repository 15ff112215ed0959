"""Plans side by side at equal stored bits: paired differences, and how well a score foretells what is measured."""

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
"""Plans that a rank correlation needs to say anything."""


@dataclass(frozen=True)
class Standing:
    """One plan at one budget, under all the names of those who would choose it.

    Attributes:
        rows: what was measured, by task.
        predicted: what each score that predicts loss says of it, in nats a token.
    """

    stored_bits: float
    names: tuple[str, ...]
    plan: Plan
    rows: Mapping[str, Row]
    predicted: Mapping[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> Estimate | None:
        """Measured increase of the loss, in nats a token; None if it could not be measured."""
        return self.rows["perplexity"].metrics.get(LOSS)


@dataclass(frozen=True)
class Comparison:
    """Two plans at one budget.

    Attributes:
        difference: of their losses, in nats a token, over the same documents; below 0 the first is better.
        ratio: of their loss increases; None if the second loses nothing.
    """

    stored_bits: float
    first: str
    second: str
    difference: Estimate
    ratio: float | None


def compare(first: tuple[str, Standing], second: tuple[str, Standing], seed: int = 0) -> Comparison | None:
    """Two named standings of one budget, document by document; None if one of them has no loss."""
    (name, one), (other_name, other) = first, second
    if one.loss is None or other.loss is None:
        return None
    records, others = (cast("Sequence[PerplexityRecord]", each.rows["perplexity"].records) for each in (one, other))
    differences = [mine["nll"] - theirs["nll"] for mine, theirs in zip(records, others, strict=True)]
    share = one.loss.value / other.loss.value if other.loss.value > 0 else None
    tokens = [record["tokens"] for record in records]
    return Comparison(one.stored_bits, name, other_name, ratio(differences, tokens, seed), share)


def rank_correlation(standings: Sequence[Standing], score: str) -> tuple[float | None, int]:
    """Spearman's correlation of what a score predicts and what was measured, and over how many different plans.

    None where it has no meaning: for fewer than three plans, or if all predictions or all losses are the same.
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
