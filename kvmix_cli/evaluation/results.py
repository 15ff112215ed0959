"""Results of an evaluation: estimates, rows and reports, without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..cache.subject import UNQUANTIZED
from .records import SampleRecord


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; the same number twice where nothing was sampled."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """Return a number without any uncertainty, such as a count of bytes."""
        return cls(value, value, value)

    def map(self, change: Callable[[float], float]) -> Estimate:
        """Return the estimate of an increasing function of the number."""
        return Estimate(change(self.value), change(self.low), change(self.high))


@dataclass(frozen=True)
class Metric:
    """A number that a task reports.

    Attributes:
        plans_only: it compares a plan with the unquantized cache, whose own row lacks it.
    """

    name: str
    higher_is_better: bool
    unit: str = ""
    plans_only: bool = False


class Table(NamedTuple):
    """A table to show: a title, the heads of its columns, rows of cells, and a footer."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    footer: str = ""


@dataclass(frozen=True)
class Row:
    """One plan, or the unquantized cache, on one task. Without metrics there is an error instead.

    Attributes:
        quantized_share: share of the (query, cached token) pairs that attention read whose token was quantized.
        stored_bits: None if they are not known, such as those of a baseline that is not installed.
        records: the measurement of each sample; none if there is an error.
        seconds: time of measuring, in all processes that were needed for it.
    """

    task: str
    plan: str
    nominal_bits: float
    stored_bits: float | None
    quantized_share: float = 0.0
    metrics: dict[str, Estimate] = field(default_factory=dict)
    error: str | None = None
    warnings: tuple[str, ...] = ()
    records: tuple[SampleRecord, ...] = field(default=(), repr=False)
    seconds: float = field(default=0.0, compare=False)

    def value(self, metric: str) -> float | None:
        """Return a metric's value, None if the row lacks it."""
        return self.metrics[metric].value if metric in self.metrics else None

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain data, as `--json` prints it."""
        data: dict[str, Any] = {
            "task": self.task,
            "plan": self.plan,
            "nominal_bits": self.nominal_bits,
            "stored_bits": self.stored_bits,
            "quantized_share": self.quantized_share,
        }
        if self.error is not None:
            return {**data, "error": self.error}
        data["metrics"] = {name: asdict(estimate) for name, estimate in self.metrics.items()}
        data["seconds"] = round(self.seconds, 3)
        return {**data, "warnings": list(self.warnings)} if self.warnings else data


@dataclass(frozen=True)
class Report:
    """All rows of one task, the unquantized cache first.

    Attributes:
        tokens: tokens that were scored, in one row.
        description: the work, for the foot of a table.
        warnings: about the task as a whole.
    """

    task: str
    tokens: int
    description: str
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    @property
    def reference(self) -> Row:
        """Return the unquantized cache's row."""
        return next(row for row in self.rows if row.plan == UNQUANTIZED)

    @property
    def plans(self) -> tuple[Row, ...]:
        """Return the other rows."""
        return tuple(row for row in self.rows if row.plan != UNQUANTIZED)
