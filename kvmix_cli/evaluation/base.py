"""What a task is: samples, what is measured on each of them, and what they amount to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import EvaluationError

if TYPE_CHECKING:
    from transformers import Cache

    from ..models import LoadedModel
    from ..plan import Plan

UNQUANTIZED = "unquantized"
"""Name of the row that every other row is compared with."""

Record = dict[str, Any]
"""What was measured on one sample: plain data, with at least `tokens` and `attended`."""


@dataclass(frozen=True)
class Settings:
    """What is asked of every task.

    Attributes:
        length: tokens of a sample.
        prefix: tokens of it that are prefilled before anything is scored, where the task scores text.
        step: tokens that are fed at a time; 1 is exact decoding.
        limit: the most samples; None is the task's default.
        text: where text comes from, see `texts.load_texts`.
    """

    length: int = 1024
    prefix: int = 256
    step: int = 32
    limit: int | None = None
    text: str = "builtin"
    seed: int = 0

    def check(self, longest: int | None) -> None:
        """Raise EvaluationError for a setting out of its range; `longest` is the model's limit in tokens."""
        for name in ("length", "prefix", "step", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"--{name} must be at least 1, got {value}")
        if longest is not None and self.length > longest:
            raise EvaluationError(f"--length {self.length} is more than the model's limit of {longest} tokens")


@dataclass(frozen=True)
class Subject:
    """What a row is about: a plan by its name, or the unquantized cache."""

    name: str = UNQUANTIZED
    plan: Plan | None = None

    def cache(self, loaded: LoadedModel, reserve: int) -> Cache:
        """An empty cache for `reserve` tokens. Raises PlanError."""
        from ..cache import MixedCache, unquantized_cache

        if self.plan is None:
            return unquantized_cache(loaded.model.config)
        return MixedCache.from_plan(self.plan, loaded.model.config, reserve=reserve)


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; the same number twice where nothing was sampled."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Estimate:
        """A number that is not an estimate at all, such as a count of bytes."""
        return cls(value, value, value)

    def map(self, change: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the number."""
        return Estimate(change(self.value), change(self.low), change(self.high))


@dataclass(frozen=True)
class Metric:
    """A number that a task reports.

    Attributes:
        plans_only: it compares a plan with something, so the unquantized row has none.
    """

    name: str
    higher_is_better: bool
    unit: str = ""
    plans_only: bool = False


@dataclass(frozen=True)
class Sample:
    """Token ids that go through the cache, and a name to find them again."""

    name: str
    ids: tuple[int, ...]


class Task(ABC):
    """One way to measure. A subclass is a file of this folder and a line in the registry."""

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    default_limit: ClassVar[int]

    def limit(self, settings: Settings) -> int:
        """The most samples."""
        return self.default_limit if settings.limit is None else settings.limit

    @abstractmethod
    def samples(self, loaded: LoadedModel, settings: Settings) -> Sequence[Sample]:
        """The samples, the same for every row; between one and `limit`. Raises KvmixError."""

    @abstractmethod
    def measure(self, loaded: LoadedModel, subject: Subject, sample: Any, settings: Settings) -> Record:
        """Put one sample through a fresh cache. Raises KvmixError."""

    @abstractmethod
    def summarise(
        self, records: Sequence[Record], reference: Sequence[Record] | None, seed: int
    ) -> dict[str, Estimate]:
        """Metrics of all samples together.

        Args:
            reference: the unquantized cache's records of the same samples; None for its own row, and if it has none.
        """

    @abstractmethod
    def describe(self, samples: Sequence[Any], settings: Settings) -> str:
        """What was measured, for the foot of a table."""

    def warnings(self, subject: Subject, metrics: dict[str, Estimate]) -> list[str]:
        """What a reader must know before believing a row."""
        return []
