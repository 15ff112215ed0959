"""The outcome of an evaluation: rows of numbers, and what must be said about them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .base import UNQUANTIZED, Estimate, Record


@dataclass(frozen=True)
class Row:
    """One plan, or the unquantized cache, on one task. Without metrics there is an error instead.

    Attributes:
        quantized_share: of the (query, cached token) pairs that attention saw while it was being measured.
        stored_bits: None if they cannot be told, such as those of a baseline that is not installed.
        records: what was measured on each sample; none if there is an error.
        seconds: that measuring took, in all runs that were needed for it.
    """

    task: str
    plan: str
    nominal_bits: float
    stored_bits: float | None
    quantized_share: float = 0.0
    metrics: dict[str, Estimate] = field(default_factory=dict)
    error: str | None = None
    warnings: tuple[str, ...] = ()
    records: tuple[Record, ...] = field(default=(), repr=False)
    seconds: float = field(default=0.0, compare=False)

    def value(self, metric: str) -> float | None:
        """A metric's value, if the row has it."""
        return self.metrics[metric].value if metric in self.metrics else None

    def as_json(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
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
        tokens: that were scored, in one row.
        description: what was measured, for the foot of a table.
        warnings: about the task as a whole.
    """

    task: str
    tokens: int
    description: str
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    @property
    def reference(self) -> Row:
        """The unquantized cache's row."""
        return next(row for row in self.rows if row.plan == UNQUANTIZED)

    @property
    def plans(self) -> tuple[Row, ...]:
        """The other rows."""
        return tuple(row for row in self.rows if row.plan != UNQUANTIZED)
