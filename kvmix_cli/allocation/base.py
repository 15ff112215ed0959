"""What a method is asked to decide, and what widths cost. Pure: scores in, bit widths out, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvmix_kernels.layout import Kind

from .. import budget as bits_and_bytes
from ..errors import BudgetError, PlanError
from ..plan import WIDTHS, CacheSettings, ModelInfo, TensorPlan
from ..profile import LayerScore

PAPER_SHARE = 0.2
"""Layers that KVmix keeps one level higher. In its own table a share of 30 % adds only 0.09 points on GSM8K."""
TOLERANCE = 1e-9
"""Bits per element: a budget that is met exactly must not be missed by the rounding of a mean."""

Widths = dict[int, tuple[int, int]]
"""A decision: bits of the keys and of the values of every layer."""


@dataclass(frozen=True)
class Budget:
    """What a plan may cost: one limit, or none for the paper's rule (20 % of the layers one level up).

    Args:
        avg_bits: mean nominal bits of keys and values.
        stored_bits: the same with scales and zeros.
        memory: bytes of the planned layers at `context` tokens and `batch` sequences.
        element_bytes: size of an element that stays unquantized, for `memory`.

    Raises:
        BudgetError: for more than one limit, or a size below 1.
    """

    avg_bits: float | None = None
    stored_bits: float | None = None
    memory: float | None = None
    context: int = 32768
    batch: int = 1
    element_bytes: int = 2

    def __post_init__(self) -> None:
        if len(self._limits) > 1:
            raise BudgetError(f"a budget has one limit, not several ({', '.join(self._limits)})")
        if min(self.context, self.batch, self.element_bytes) < 1:
            raise BudgetError(f"context and batch must be at least 1, got {self.context} and {self.batch}")

    @property
    def _limits(self) -> dict[str, float]:
        limits = {"avg_bits": self.avg_bits, "stored_bits": self.stored_bits, "memory": self.memory}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @property
    def limit(self) -> float | None:
        """Bits per element or bytes; None for the paper's rule."""
        return next(iter(self._limits.values()), None)

    @property
    def summary(self) -> dict[str, Any]:
        """What was asked for, for a plan's provenance."""
        if self.memory is not None:
            return {"memory": self.memory, "context": self.context, "batch": self.batch}
        return dict(self._limits) or {"share": PAPER_SHARE}

    def cost(self, bits: int, kind: Kind, cache: CacheSettings, model: ModelInfo) -> float:
        """What one layer's keys or values take: bytes under a memory limit, otherwise half their bits per element."""
        tensor = TensorPlan(bits=bits)
        if self.memory is not None:
            sizes = (self.context, self.batch, self.element_bytes)
            return bits_and_bytes.tensor_bytes(tensor, kind, cache, model, *sizes).total
        count: bits_and_bytes.Count = "nominal" if self.stored_bits is None else "stored"
        return bits_and_bytes.tensor_bits(tensor, kind, cache, model.head_dim, count) / 2


@dataclass(frozen=True)
class Problem:
    """Everything a method may look at.

    Args:
        scores: of the layers to plan; higher is more important.
        k_bits, v_bits: the ladders of widths to choose from.
        seed: of methods that draw at random.
        score: name of the scores.

    Raises:
        BudgetError: if a ladder is empty or has an unknown width, or if there is no layer to plan.
    """

    model: ModelInfo
    scores: Mapping[int, LayerScore]
    budget: Budget
    k_bits: tuple[int, ...]
    v_bits: tuple[int, ...]
    cache: CacheSettings
    seed: int = 0
    score: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "k_bits", _ladder("k_bits", self.k_bits))
        object.__setattr__(self, "v_bits", _ladder("v_bits", self.v_bits))
        if not self.scores:
            raise BudgetError(f"{self.model.id} has no layer to plan: every layer keeps its stock cache")

    @property
    def levels(self) -> list[tuple[int, int]]:
        """Widths of keys and values, level by level; the shorter ladder stays at its top."""
        top = max(len(self.k_bits), len(self.v_bits)) - 1
        return [
            (self.k_bits[min(level, len(self.k_bits) - 1)], self.v_bits[min(level, len(self.v_bits) - 1)])
            for level in range(top + 1)
        ]

    @property
    def steps(self) -> int:
        """Single moves of one layer, one level up, from all at the lowest level to all at the highest."""
        return len(self.scores) * (len(self.levels) - 1)

    @property
    def allowance(self) -> float:
        """What all layers together may cost. Under the paper's rule: what its share of higher layers costs."""
        if self.budget.limit is None:
            return self.cost_after(min(self.steps, max(1, round(PAPER_SHARE * len(self.scores)))))
        if self.budget.memory is not None:
            return self.budget.memory
        return (self.budget.limit + TOLERANCE) * len(self.scores)

    def cost(self, widths: tuple[int, int]) -> float:
        """What one layer with these widths costs. Raises PlanError if its head cannot be packed."""
        k_bits, v_bits = widths
        try:
            return self.budget.cost(k_bits, "key", self.cache, self.model) + self.budget.cost(
                v_bits, "value", self.cache, self.model
            )
        except ValueError as error:
            raise PlanError(f"no plan for {self.model.id}: {error}") from error

    def cost_after(self, moves: int) -> float:
        """What all layers cost after that many moves, made level by level."""
        level, higher = divmod(moves, len(self.scores))
        lower = len(self.scores) - higher
        costs = self._level_costs
        return lower * costs[level] + (higher * costs[level + 1] if higher else 0)

    @cached_property
    def _level_costs(self) -> list[float]:
        return [self.cost(widths) for widths in self.levels]

    def check_reachable(self) -> None:
        """Raise BudgetError, with the reachable range, if no plan meets the budget or even the largest falls short."""
        lowest, highest = self.cost_after(0), self.cost_after(self.steps)
        beyond = self.budget.memory is None and self.allowance > highest + 2 * TOLERANCE * len(self.scores)
        if not lowest <= self.allowance or beyond:
            raise BudgetError(_out_of_range(self, lowest, highest))


def _ladder(name: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    """Ascending and without repetition."""
    if not widths or any(bits not in WIDTHS for bits in widths):
        known = ", ".join(map(str, WIDTHS))
        raise BudgetError(f"{name} must be taken from {known}, got {', '.join(map(str, widths)) or 'nothing'}")
    return tuple(sorted(set(widths)))


def _out_of_range(problem: Problem, lowest: float, highest: float) -> str:
    budget, layers = problem.budget, len(problem.scores)
    ladders = f"K widths {_list(problem.k_bits)} and V widths {_list(problem.v_bits)}"
    if budget.memory is not None:
        asked = f"{bits_and_bytes.format_bytes(budget.memory)} at {budget.context} tokens x {budget.batch}"
        reach = f"take {bits_and_bytes.format_bytes(lowest)} to {bits_and_bytes.format_bytes(highest)}"
        return f"no plan fits {asked}: {ladders} {reach}; lower --k-bits and --v-bits, --context or --batch"
    count = "nominal" if budget.stored_bits is None else "stored"
    reach = f"reach {lowest / layers:.4g} to {highest / layers:.4g}"
    widen = "--k-bits and --v-bits" if budget.stored_bits is None else "--k-bits, --v-bits and --group-size"
    return f"no plan has {budget.limit:g} {count} bits: {ladders} {reach}; widen the range with {widen}"


def _list(widths: tuple[int, ...]) -> str:
    return ",".join(map(str, widths))
