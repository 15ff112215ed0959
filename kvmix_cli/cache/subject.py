"""Subjects of an evaluation: a plan, a baseline or the unquantized cache, each of which becomes a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from kvmix_kernels.layout import FULL_PRECISION_BITS
from pydantic import Field
from typing_extensions import TypedDict

from ..plan import Plan

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

Pairs = Annotated[float, Field(ge=0, le=2.0**62)]
UNQUANTIZED = "unquantized"
"""Name of the row that every other row is compared with."""


class Baseline(Protocol):
    """A cache of another project, measured beside ours.

    Attributes:
        settings: everything that its numbers depend on, as plain data.
        stored_bits: bits per element, scales included; None if they cannot be measured here.
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    @property
    def nominal_bits(self) -> float: ...

    @property
    def stored_bits(self) -> float | None: ...

    def cache(self, config: PreTrainedConfig) -> Cache:
        """Return an empty cache for a model. Raises EvaluationError if what it needs is not installed."""
        ...


@dataclass(frozen=True)
class Subject:
    """A plan by its name, a baseline, or (with neither) the unquantized cache."""

    name: str = UNQUANTIZED
    plan: Plan | None = None
    baseline: Baseline | None = None

    @property
    def bits(self) -> tuple[float, float | None]:
        """Return nominal and stored bits."""
        if self.plan is not None:
            return self.plan.bits.nominal, self.plan.bits.stored
        if self.baseline is not None:
            return self.baseline.nominal_bits, self.baseline.stored_bits
        return FULL_PRECISION_BITS, FULL_PRECISION_BITS

    def cache(self, config: PreTrainedConfig, reserve: int) -> Cache:
        """Return an empty cache for `reserve` tokens. Raises PlanError, or EvaluationError for a baseline."""
        from .mixed import MixedCache, unquantized_cache

        if self.plan is not None:
            return MixedCache.from_plan(self.plan, config, reserve=reserve)
        return unquantized_cache(config) if self.baseline is None else self.baseline.cache(config)


class AttendedPairs(TypedDict):
    """The (query, cached token) pairs that attention has read, and how many of the tokens were quantized."""

    total: Pairs
    quantized: Pairs


def attended(cache: Cache) -> AttendedPairs:
    """Return the pairs that attention has read through a cache; none for a cache that does not count them."""
    counted = getattr(cache, "attended", None)
    return {"total": 0, "quantized": 0} if counted is None else {"total": counted.total, "quantized": counted.quantized}
