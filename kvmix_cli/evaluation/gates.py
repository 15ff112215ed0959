"""Gates for CI: `--fail-if "perplexity>+1%"` fails if any plan's perplexity is more than 1 % above the unquantized one.

    METRIC (< | <= | > | >=) [+ | -] NUMBER [%]

A sign makes the number relative to the unquantized row: absolute, or with `%` a share of its value.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..errors import EvaluationError, did_you_mean
from .results import Row

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_SYNTAX = re.compile(
    r"\s*(?P<metric>[a-z][a-z0-9_]*)\s*(?P<comparison>[<>]=?)\s*"
    r"(?P<sign>[+-])?(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,2})?)\s*(?P<percent>%)?\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class GateOutcome:
    """The outcome of a gate; `failures` has a line for each row that failed it."""

    expression: str
    passed: bool
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gate:
    """The condition under which an evaluation fails."""

    expression: str
    metric: str
    comparison: str
    number: float
    relative: bool
    percent: bool

    def limit(self, reference: float | None) -> float | None:
        """Return the number that a value is compared with; None if it is relative and the reference is unknown."""
        if not self.relative:
            return self.number
        if reference is None:
            return None
        return reference + (self.number / 100 * abs(reference) if self.percent else self.number)

    def check(self, rows: Sequence[Row], reference: Row) -> GateOutcome:
        """Check the plans' rows of one task. A row that could not be measured fails."""
        unquantized = reference.value(self.metric)
        failures = [failure for row in rows if (failure := self._failure(row, unquantized))]
        return GateOutcome(self.expression, not failures, tuple(failures))

    def _failure(self, row: Row, unquantized: float | None) -> str | None:
        value, limit = row.value(self.metric), self.limit(unquantized)
        if value is None:
            return f"{row.plan}: {self.metric} was not measured"
        if limit is None:
            return f"{row.plan}: {self.metric} of the unquantized cache was not measured"
        if not _COMPARISONS[self.comparison](value, limit):
            return None
        beside = f", unquantized {unquantized:.6g}" if self.relative else ""
        return f"{row.plan}: {self.metric} {value:.6g} {self.comparison} {limit:.6g}{beside}"


def parse_gate(expression: str, metrics: Collection[str], relative: Collection[str]) -> Gate:
    """Return the gate of an expression.

    Args:
        metrics: metrics that the tasks report.
        relative: metrics that the unquantized row has as well.

    Raises:
        EvaluationError: if it is not of the form above, or its metric is unknown.
    """
    match = _SYNTAX.fullmatch(expression)
    if match is None:
        raise EvaluationError(
            f"'{expression}' is not a gate: write a metric, one of < <= > >= and a number, "
            "such as 'perplexity>+1%' or 'recall<0.8'"
        )
    name = match["metric"].lower()
    if name not in metrics:
        raise EvaluationError(
            f"gate '{expression}': no metric '{name}'{did_you_mean(name, metrics)}; "
            f"the tasks report {', '.join(metrics)}"
        )
    if match["percent"] and not match["sign"]:
        raise EvaluationError(f"gate '{expression}': a percentage needs a sign, as in {name}{match['comparison']}+1%")
    if match["sign"] and name not in relative:
        raise EvaluationError(f"gate '{expression}': {name} has no unquantized value to be relative to; drop the sign")
    number = float(match["number"]) * (-1 if match["sign"] == "-" else 1)
    return Gate(expression.strip(), name, match["comparison"], number, bool(match["sign"]), bool(match["percent"]))
