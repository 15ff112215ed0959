"""Judgements: what each task says about a plan at a context, and all of them together.

A plan is safe at a context if

- the upper end of the 95 % interval of its KL is within the bound, over documents as long as the context, and the KL
  of no part of their positions is above it;
- of the values that were asked for it recalls no smaller share than the lower end of the unquantized cache's interval;
- the first number of every other task is, likewise, not beyond the unquantized cache's interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from ...evaluation.bootstrap import ratio
from ...evaluation.positions import PositionBucket, by_position
from ...evaluation.results import Estimate, Metric, Row

FEWEST: Final = 6
"""Documents without which an interval proves nothing: that n of them all lie on one side of the median has the
probability 2 ** (1 - n), which is below 5 % from six on."""
ENOUGH: Final = 60
"""Values without which recall proves nothing: none lost among n still allows a loss of 3 / n (the rule of three)."""
NO_QUALITY: Final = ("bytes", "x", "tokens/s")
"""Units of numbers that say nothing about what a model still can."""

Reason = Literal[
    "within",
    "above",
    "unclear",
    "few documents",
    "few values",
    "no interval",
    "nothing to lose",
    "nothing read",
    "not measured",
]
"""The reason for a judgement, for sentences; see `Judgement`."""
Outcome = Literal["safe", "safe-up-to", "not-safe", "not-proven"]


class Judgement(NamedTuple):
    """One task's word on a plan.

    Attributes:
        metric: the number that was judged.
        passed: None if it cannot be told.
        reason: `within` or `above` a limit; `unclear` for an interval on both sides of it; `nothing to lose` if the
            unquantized cache has none right, so that the number cannot decide; else what is missing.
        own, reference: the plan's number and the unquantized cache's.
        limit: the largest KL, or the end of the unquantized cache's interval.
        reach: tokens of context within which KL is proven to be within the limit.
        missing: tokens of text, or values to ask for, that a proof lacks, about.
        error: why it was not measured.
        part: the part of the positions whose KL is the highest.
    """

    task: str
    metric: str
    passed: bool | None
    reason: Reason
    own: Estimate | None = None
    reference: Estimate | None = None
    limit: float | None = None
    reach: int = 0
    missing: int | None = None
    error: str = ""
    part: PositionBucket | None = None

    @property
    def may_pass(self) -> bool:
        """Return whether more bits could pass where this plan did not: text that is missing stays missing."""
        return not self.passed and self.reason in ("above", "unclear", "no interval")


def judge_divergence(row: Row, limit: float, length: int, lacking: int = 0) -> Judgement:
    """Judge a row of perplexity by its KL.

    Args:
        limit: the largest KL, in nats a token.
        length: tokens of the documents.
        lacking: tokens of text that are missing for documents as long as the context.
    """
    task, metric = row.task, "kl"
    own = row.metrics.get(metric)
    if row.error is not None or own is None:
        error = row.error or "the unquantized cache, which it is compared with, could not be read to the end"
        return Judgement(task, metric, None, "not measured", error=error)
    if not row.quantized_share:
        return Judgement(task, metric, None, "nothing read", own, limit=limit)
    buckets, count = by_position(row.records), len(row.records)
    found = reach(row.records, buckets, limit, length)
    worst = max(buckets, key=lambda bucket: bucket["kl"].value)
    proven = found if count >= FEWEST else 0
    judged = Judgement(task, metric, None, "unclear", own, limit=limit, reach=proven, part=worst)
    if own.low > limit or any(bucket["kl"].low > limit for bucket in buckets):
        return judged._replace(passed=False, reason="above")
    if lacking or count < FEWEST:
        return judged._replace(reason="few documents", missing=lacking or (FEWEST - count) * length)
    if found >= length:
        return judged._replace(passed=True, reason="within")
    highest = max(own, worst["kl"], key=lambda estimate: estimate.value)
    return judged._replace(missing=_missing(highest if highest.value > limit else own, limit, count, length))


def reach(records: Sequence[Mapping[str, Any]], buckets: Sequence[PositionBucket], limit: float, length: int) -> int:
    """Return the tokens of context within which KL is within a limit; 0 if there are none.

    That is the end of the last part of the positions up to which the KL of no part is above the limit, and the upper
    end of the interval of all parts so far is within it.
    """
    found, kl, tokens = 0, [0.0] * len(records), [0] * len(records)
    for bucket in buckets:
        if bucket["kl"].value > limit:
            break
        for number, record in enumerate(records):
            start, stop = (max(0, bucket[end] - record["first"]) for end in ("start", "stop"))
            part = record["kl"][start:stop]
            kl[number] += math.fsum(part)
            tokens[number] += len(part)
        if ratio(kl, tokens).high <= limit:
            found = min(bucket["stop"], length)
    return found


def is_within(row: Row, limit: float) -> bool:
    """Return whether the KL of all documents together, and of each part of their positions, is within a limit.

    Intervals are not looked at.
    """
    own = row.metrics.get("kl")
    found = own is not None and own.value <= limit
    return found and all(bucket["kl"].value <= limit for bucket in by_position(row.records))


def _missing(own: Estimate, limit: float, count: int, length: int) -> int | None:
    """Return the tokens of text after which an interval would end at the limit; None if its number is above it.

    The width of an interval falls with the square root of the number of documents.
    """
    room = limit - own.value
    if room <= 0:
        return None
    return max(1, math.ceil(count * ((own.high - own.value) / room) ** 2) - count) * length


def judge_values(row: Row, reference: Row) -> Judgement:
    """Judge a row of a task whose records have values that were asked for, such as recall."""
    judged = judge_number(row, reference, Metric(row.task, higher_is_better=True))
    values = sum(len(record["answers"]) for record in _answered(row))
    if judged.passed and values < ENOUGH:
        return judged._replace(passed=None, reason="few values", missing=ENOUGH - values)
    return judged


def judge_number(row: Row, reference: Row, metric: Metric) -> Judgement:
    """Judge a row by a number that the unquantized cache has as well."""
    own, other = row.metrics.get(metric.name), reference.metrics.get(metric.name)
    if row.error is not None or own is None or other is None:
        return Judgement(row.task, metric.name, None, "not measured", error=row.error or reference.error or "")
    if not row.quantized_share:
        return Judgement(row.task, metric.name, None, "nothing read", own, other)
    if metric.higher_is_better and other.value == 0:
        return Judgement(row.task, metric.name, True, "nothing to lose", own, other)
    limit = other.low if metric.higher_is_better else other.high
    is_within_limit = own.value >= limit if metric.higher_is_better else own.value <= limit
    judged = Judgement(row.task, metric.name, is_within_limit, "within", own, other, limit)
    if is_within_limit:
        return judged
    if other.low == other.high:
        return judged._replace(passed=None, reason="no interval")
    return judged._replace(reason="above")


def judged_metric(row: Row, reference: Row, metrics: Sequence[Metric]) -> Metric | None:
    """Return the first number of a task that says something about quality and that both rows have, if there is one."""
    both = [metric for metric in metrics if metric.unit not in NO_QUALITY and not metric.plans_only]
    return next((each for each in both if each.name in row.metrics and each.name in reference.metrics), None)


def is_about_values(row: Row) -> bool:
    """Return whether a row's records have values that were asked for."""
    return bool(_answered(row))


def _answered(row: Row) -> list[Mapping[str, Any]]:
    return [record for record in row.records if "answers" in record]


def outcome(judgements: Sequence[Judgement], context: int) -> tuple[Outcome, int | None]:
    """Return what all judgements say together, and the tokens of context for which the plan is safe, if any.

    A plan whose KL is above the limit only behind some position is safe up to there, if nothing else speaks against
    it. A plan of which something cannot be told is not proven, but may be within the limit up to some position.
    """
    if all(each.passed for each in judgements):
        return "safe", context
    proven = next((each.reach for each in judgements if each.metric == "kl"), 0) or None
    failed = [each for each in judgements if each.passed is False]
    if not failed:
        return "not-proven", proven
    if proven and all(each.metric == "kl" for each in failed):
        return "safe-up-to", proven
    return "not-safe", None
