"""What a task is: samples, what is measured on each of them, and what they amount to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from kvmix_kernels.layout import FULL_PRECISION_BITS

from ..errors import EvaluationError

if TYPE_CHECKING:
    from transformers import Cache

    from ..models import LoadedModel
    from ..plan import Plan
    from .report import Row

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

    def check(self) -> None:
        """Raise EvaluationError for a setting out of its range."""
        for name in ("length", "prefix", "step", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"--{name} must be at least 1, got {value}")


class Baseline(Protocol):
    """Somebody else's cache, to be measured beside ours.

    Attributes:
        settings: all that its numbers depend on, as plain data.
        stored_bits: bits a number with all that it takes to read it again; None if that cannot be told here.
    """

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    @property
    def nominal_bits(self) -> float: ...

    @property
    def stored_bits(self) -> float | None: ...

    def cache(self, loaded: LoadedModel) -> Cache:
        """An empty cache. Raises EvaluationError if what it needs is not installed."""
        ...


@dataclass(frozen=True)
class Subject:
    """What a row is about: a plan by its name, a baseline, or the unquantized cache."""

    name: str = UNQUANTIZED
    plan: Plan | None = None
    baseline: Baseline | None = None

    @property
    def bits(self) -> tuple[float, float | None]:
        """Nominal and stored."""
        if self.plan is not None:
            return self.plan.bits.nominal, self.plan.bits.stored
        if self.baseline is not None:
            return self.baseline.nominal_bits, self.baseline.stored_bits
        return FULL_PRECISION_BITS, FULL_PRECISION_BITS

    def cache(self, loaded: LoadedModel, reserve: int) -> Cache:
        """An empty cache for `reserve` tokens. Raises PlanError, or EvaluationError for a baseline."""
        from ..cache import MixedCache, unquantized_cache

        if self.plan is not None:
            return MixedCache.from_plan(self.plan, loaded.model.config, reserve=reserve)
        return unquantized_cache(loaded.model.config) if self.baseline is None else self.baseline.cache(loaded)


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


class Context(NamedTuple):
    """Tokens of the longest context that was asked for, and the option that says so."""

    option: str
    tokens: int


class Table(NamedTuple):
    """As `console.table` takes it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    footer: str = ""


def counted(number: int, thing: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


class Task(ABC):
    """One way to measure. A subclass is a file of this folder and a line in the registry.

    A task with options of its own is a frozen dataclass: its fields are the options, named as on the command line.

    Attributes:
        timed: whether its numbers are times, which another machine would not give again.
    """

    default_limit: ClassVar[int]
    timed: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """As in tables and in names of folders."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """What it reports; names are unique over all tasks, so that a gate can name them."""

    def options(self) -> dict[str, Any]:
        """What was asked of this task alone, as plain data."""
        return asdict(self) if is_dataclass(self) else {}

    def limit(self, settings: Settings) -> int:
        """The most samples."""
        return self.default_limit if settings.limit is None else settings.limit

    def context(self, settings: Settings) -> Context | None:
        """How long contexts are; None where the samples have lengths of their own."""
        return Context("--length", settings.length)

    def check_context(self, settings: Settings, limit: int | None) -> None:
        """Raise EvaluationError for contexts beyond the model's limit in tokens."""
        context = self.context(settings)
        if context is not None and limit is not None and context.tokens > limit:
            raise EvaluationError(f"{context.option} {context.tokens} is more than the model's limit of {limit} tokens")

    def longer(self, settings: Settings) -> str:
        """What to do for contexts that are longer than a plan's window."""
        context = self.context(settings)
        return "ask something with longer prompts" if context is None else f"use a larger {context.option}"

    @abstractmethod
    def samples(self, loaded: LoadedModel, settings: Settings) -> Sequence[Sample]:
        """The samples, the same for every row; between one and `limit`. Raises KvmixError."""

    def records(
        self, loaded: LoadedModel, subject: Subject, samples: Sequence[Any], settings: Settings
    ) -> Iterator[Record]:
        """One record for each sample, in their order. Raises KvmixError."""
        for sample in samples:
            yield self.measure(loaded, subject, sample, settings)

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

    def notices(self, samples: Sequence[Any], settings: Settings) -> tuple[str, ...]:
        """What must be said about the samples: here, that there are fewer of them than were asked for."""
        asked, found = self.limit(settings), len(samples)
        return () if found >= asked else (f"{self.name}: {settings.text} has {counted(found, 'sample')}, not {asked}",)

    def details(self, rows: Sequence[Row]) -> list[Table]:
        """More to show of all rows than their metrics."""
        return []

    def warnings(self, subject: Subject, metrics: dict[str, Estimate]) -> list[str]:
        """What a reader must know before believing a row."""
        return []
