"""Answers in words: how safe a plan is to use instead of the unquantized cache, as far as it was tested.

Every sentence states its numbers and the margin within which a plan counts as safe.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ...counting import counted
from ...evaluation.bootstrap import ratio
from ...evaluation.collect import Collection, Group, Line, Measurement
from ...evaluation.results import Estimate, Metric, Row
from ..comparison import headline, short_name
from ..printable import one_line
from .evaluation import format_estimate

DIVERGENCE, PERPLEXITY, RECALL, OTHER = 0.01, 1.0, 0.05, 0.05
"""Margins that still count as safe: KL in nats a token; percent of perplexity more, where KL was not measured; a share
of the values asked for that are no longer recalled; a share of any other number that is lost. Every sentence that uses
one states it."""
FEW = 3.0
"""Losses that none seen among n values still allows, with 95 % confidence: 3 / n (the rule of three)."""
SLACK = 1e-9
"""Share of a margin that rounding may add."""
KILO = 1024

Outcome = Literal["safe", "cannot tell", "worse", "nothing read", "not measured"]
ORDER: tuple[Outcome, ...] = ("safe", "cannot tell", "worse", "nothing read", "not measured")


class Evidence(NamedTuple):
    """One measurement's word on a plan.

    Attributes:
        numbers: the numbers in words.
        loss: how much worse than the unquantized cache, in units of what still counts as safe.
        margin: what still counts as safe at most, in words.
        context: the longest one, in tokens; None if it is not known.
        why: the reason if the loss cannot be told from too few samples; else empty.
        floor: loss above which the interval must lie if the plan is surely worse; KL is above zero for any plan.
    """

    name: str
    numbers: str
    loss: Estimate
    margin: str
    context: int | None
    why: str = ""
    floor: float = 0.0

    @property
    def outcome(self) -> Outcome:
        """Return `safe` for an interval within the margin, `worse` for a loss beyond it that is surely one."""
        if not self.why and self.loss.high <= 1 + SLACK:
            return "safe"
        return "worse" if self.loss.low > self.floor and self.loss.value > 1 else "cannot tell"


class Verdict(NamedTuple):
    """One plan's answer; `loss` is the largest of its losses, in units of what still counts as safe."""

    line: Line
    outcome: Outcome
    text: str
    loss: float = 0.0


def answers(collection: Collection) -> list[str]:
    """Return the answer of every group, with its name if there are several."""
    several = len(collection.groups) > 1
    return [f"{one_line(group.title)}: {answer(group)}" if several else answer(group) for group in collection.groups]


def answer(group: Group) -> str:
    """Return one sentence on the smallest plan that is safe; or, if none is, on the one nearest to it."""
    found = verdicts(group)
    return found[0].text if found else "no plan was measured, only the unquantized cache"


@functools.lru_cache(maxsize=64)  # a report shows them on the terminal, on the page and in JSON
def verdicts(group: Group) -> list[Verdict]:
    """Return the verdict of every plan: safe ones first, the smallest before the others, then by what they lose."""
    found = [verdict(group, line) for line in group.lines if not line.is_reference]
    size = {each.line.key: each.line.stored_bits or math.inf for each in found}
    return sorted(
        found,
        key=lambda each: (
            ORDER.index(each.outcome),
            size[each.line.key] if each.outcome == "safe" else each.loss,
            size[each.line.key],
        ),
    )


def verdict(group: Group, line: Line) -> Verdict:
    """Return what all measurements of quality together say about a plan, with their numbers and margins."""
    stored = "" if line.stored_bits is None else f" at {line.stored_bits:.3g} stored bits"
    name = one_line(f"{line.label}{stored}")
    evidence: list[Evidence] = []
    unread, failed = [], []
    reference = next((each for each in group.lines if each.is_reference), None)
    for measurement in group.measurements:
        metric, row = headline(measurement), measurement.row(line)
        if metric is None or row is None:
            continue
        if row.error is not None:
            failed.append(f"{measurement.title} could not be measured ({row.error})")
        elif not row.quantized_share:
            unread.append(measurement.title)
        else:
            other = measurement.row(reference) if reference else None
            evidence += _evidence(measurement, metric, row, other)
    if evidence:
        return _judged(line, name, evidence, [*_unread(unread), *failed])
    if unread:
        return Verdict(line, "nothing read", one_line(f"{name}: {_unread(unread)[0]}"))
    why = "; ".join(failed) or "no quality was measured beside the unquantized cache's; add --task perplexity,recall"
    return Verdict(line, "not measured", one_line(f"{name}: cannot tell: {why}"))


def _unread(tasks: Sequence[str]) -> list[str]:
    if not tasks:
        return []
    where = ", ".join(tasks)
    return [f"nothing quantized was read in {where}, which says nothing about it; use longer contexts"]


def _judged(line: Line, name: str, evidence: Sequence[Evidence], notes: Sequence[str]) -> Verdict:
    """Return the worst outcome of all, in words."""
    outcome = max((each.outcome for each in evidence), key=ORDER.index)
    contexts = {each.context for each in evidence if each.context}
    numbers = [_with_context(each, len(contexts) > 1) for each in evidence]
    if outcome == "safe":
        said = f"safe{_reach(evidence)}"
        said += f" (with 95 % confidence at most {_margins(evidence)})"
    elif outcome == "worse":
        lost = [each for each in evidence if each.outcome == "worse"]
        said = f"worse in {' and '.join(each.name for each in lost)}"
        said += f" (safe would be at most {_margins(lost)})"
    else:
        unclear = [each for each in evidence if each.outcome == "cannot tell"]
        why = [each.why or f"it may be more than {each.margin}" for each in unclear]
        said = f"cannot tell, {' and '.join(dict.fromkeys(why))}; measure more with a larger --limit"
    text = one_line("; ".join([f"{name}: {', '.join(numbers)}: {said}", *notes]))
    return Verdict(line, outcome, text, max(each.loss.value for each in evidence))


def _margins(evidence: Sequence[Evidence]) -> str:
    return " and ".join(dict.fromkeys(each.margin for each in evidence))


def _with_context(evidence: Evidence, differ: bool) -> str:
    where = f" at {tokens(evidence.context)}" if differ and evidence.context else ""
    return f"{evidence.numbers}{where}"


def _reach(evidence: Sequence[Evidence]) -> str:
    """Return how far it was tested: to the shortest of the tasks' contexts by all of them."""
    known = [(each.context, each.name) for each in evidence if each.context]
    if not known:
        return ", as far as tested"
    shortest, longest = min(known)[0], max(known)[0]
    if shortest == longest:
        return f" at {tokens(shortest)}, not tested beyond"
    beyond = " and ".join(dict.fromkeys(name for context, name in known if context > shortest))
    return f" at {tokens(shortest)}; up to {tokens(longest)} only {beyond} was tested, nothing beyond"


def tokens(count: int) -> str:
    """Return `4K` for 4096, `1000 tokens` for 1000."""
    return f"{count // KILO}K" if count % KILO == 0 else counted(count, "token")


def _evidence(measurement: Measurement, metric: Metric, row: Row, reference: Row | None) -> list[Evidence]:
    """Return what a measurement says; nothing if there is no unquantized cache to compare with."""
    context = _context(measurement, row)
    if "kl" in row.metrics:
        return [_divergence(row.metrics["kl"], context, len(row.records))]
    estimate = row.metrics.get(metric.name)
    if estimate is None:
        return []
    if metric.plans_only:
        return [_increase(metric, estimate, context, len(row.records))]
    pairs = None if reference is None else _pairs(row.records, reference.records)
    if pairs:
        return [_recalled(measurement.task, pairs, context)]
    other = None if reference is None else reference.metrics.get(metric.name)
    return [] if other is None or not other.value else [_number(metric, estimate, other, row, context)]


def _divergence(estimate: Estimate, context: int | None, samples: int) -> Evidence:
    """Return what the divergence from the unquantized cache's predictions says."""
    why = "" if samples > 1 else "one sample of KL has no interval"
    numbers = f"KL {format_estimate(estimate, '')} nats a token"
    loss = estimate.map(lambda nats: nats / DIVERGENCE)
    return Evidence("KL", numbers, loss, f"a KL of {DIVERGENCE:g} nats a token", context, why, floor=1.0)


def _increase(metric: Metric, estimate: Estimate, context: int | None, samples: int) -> Evidence:
    """Return what a paired increase in percent says."""
    name = short_name(metric).removesuffix(" increase")
    why = "" if samples > 1 else f"one sample of {name} has no interval"
    loss = estimate.map(lambda value: value / PERPLEXITY)
    value, _, interval = format_estimate(estimate, "%").partition(" % [")
    numbers = f"{value.removesuffix(' %')} % {name}" + (f" [{interval.replace(' %', '')}" if interval else "")
    return Evidence(name, numbers, loss, f"{PERPLEXITY:g} % more {name}", context, why)


def _recalled(name: str, pairs: Sequence[tuple[int, int, int]], context: int | None) -> Evidence:
    """Return what values say that were asked for through both caches; exercises are drawn for the interval."""
    own, other, asked = (sum(column) for column in zip(*pairs, strict=True))
    lost = ratio([theirs - mine for mine, theirs, _ in pairs], [count for _, _, count in pairs])
    least = FEW / asked
    loss = Estimate(lost.value, lost.low, max(lost.high, least)).map(lambda share: share / RECALL)
    few = least > RECALL * (1 + SLACK)
    why = f"{counted(asked, 'value')} of {name} cannot show a loss of {100 * RECALL:g} %" if few else ""
    margin = f"{100 * RECALL:g} % fewer values of {name}"
    return Evidence(name, f"{name} {own} of {asked} against {other}", loss, margin, context, why)


def _number(metric: Metric, own: Estimate, other: Estimate, row: Row, context: int | None) -> Evidence:
    """Return what any other number says: by its paired change if the task has one, or else by the two intervals."""
    sign, name = (1 if metric.higher_is_better else -1), short_name(metric)
    change = row.metrics.get(f"{metric.name}_change")
    if change is None:
        value = own.value - other.value
        half = math.hypot(own.high - own.low, other.high - other.low) / 2
        change = Estimate(value, value - half, value + half)
    unit = OTHER * abs(other.value)
    low, high = sorted((-sign * change.low / unit, -sign * change.high / unit))
    loss = Estimate(-sign * change.value / unit, low, high)
    direction = "less" if metric.higher_is_better else "more"
    against = format_estimate(Estimate.exact(other.value), metric.unit)
    numbers = f"{name} {format_estimate(own, metric.unit)} against {against}"
    why = "" if own.low < own.high or other.low < other.high else f"{name} has no interval"
    return Evidence(name, numbers, loss, f"{100 * OTHER:g} % {direction} {name}", context, why)


def _pairs(records: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, int]]:
    """Return values recalled through both caches, and asked for, by exercise.

    Empty if the records are of another kind.
    """
    try:
        found = [
            (*(sum(bool(answer["recalled"]) for answer in each["answers"]) for each in pair), len(pair[0]["answers"]))
            for pair in zip(records, others, strict=True)
            if len(pair[0]["answers"]) == len(pair[1]["answers"])
        ]
    except (KeyError, TypeError, ValueError):
        return []
    return [(own, other, asked) for own, other, asked in found if asked] if len(found) == len(records) else []


def _context(measurement: Measurement, row: Row) -> int | None:
    """Return the longest context of a measurement, in tokens; None if it is not known."""
    records: Sequence[Mapping[str, Any]] = row.records
    lengths = [each["context"] for each in records if isinstance(each.get("context"), int)]
    if not lengths and measurement.task == "perplexity":
        settings = next(iter(measurement.runs.values())).config.get("settings")
        length = settings.get("length") if isinstance(settings, dict) else None
        lengths = [length] if isinstance(length, int) else []
    return max(lengths, default=None)
