"""The base of all tasks: samples, the measurement of each of them, and metrics of all of them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple

from typing_extensions import TypeVar

from ..cache.subject import Subject
from ..counting import counted
from ..errors import EvaluationError, TextError
from ..texts.tokens import beginning, encode, opening
from .records import SampleRecord
from .results import Estimate, Metric, Row, Table

if TYPE_CHECKING:
    from ..models.loading import LoadedModel


@dataclass(frozen=True)
class Settings:
    """Settings that all tasks share.

    Attributes:
        length: tokens of a sample.
        prefix: tokens of it that are prefilled before anything is scored, where the task scores text.
        step: tokens that are fed at a time; 1 is exact decoding.
        limit: the most samples; None is the task's default.
        text: source of texts, see `texts.load_texts`.
        seed: seed of all random choices.
        prefill_chunk: tokens of a context that are prefilled at a time, each packed before the next; None for all.
    """

    length: int = 1024
    prefix: int = 256
    step: int = 32
    limit: int | None = None
    text: str = "builtin"
    seed: int = 0
    prefill_chunk: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the settings as plain data; a context that is prefilled at once needs no mention."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("prefill_chunk", None)}

    def check(self) -> None:
        """Raise EvaluationError for a setting out of its range."""
        for name in ("length", "prefix", "step", "limit", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


@dataclass(frozen=True)
class Sample:
    """Token ids that go through the cache, and a name to find them again."""

    name: str
    ids: tuple[int, ...]


class Context(NamedTuple):
    """Tokens of the longest context of a task, and the option that sets them."""

    option: str
    tokens: int


SampleT = TypeVar("SampleT", bound=Sample, default=Any)
RecordT = TypeVar("RecordT", bound=SampleRecord, default=Any)


class Task(ABC, Generic[SampleT, RecordT]):
    """One way to measure a cache. A subclass is a file of `tasks/` and a line in the registry.

    A task with options of its own is a frozen dataclass: its fields are the options, named as on the command line.

    Attributes:
        timed: the numbers are times, which another machine would not give again.
        is_local: the numbers are of one process, such as times and bytes: no rank measures for another one.
        side_by_side: rows measure a sample together, part by part, and compare their parts.
        unread: settings that change nothing in it.
    """

    default_limit: ClassVar[int]
    unread: ClassVar[tuple[str, ...]] = ("prefix",)
    timed: ClassVar[bool] = False
    is_local: ClassVar[bool] = False
    side_by_side: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name in tables and in names of folders."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """Return the metrics it reports; their names are unique over all tasks, so that a gate can name them."""

    def options(self) -> dict[str, Any]:
        """Return the options of this task alone, as plain data."""
        return asdict(self) if is_dataclass(self) else {}

    def limit(self, settings: Settings) -> int:
        """Return the most samples."""
        return self.default_limit if settings.limit is None else settings.limit

    def context(self, settings: Settings) -> Context | None:
        """Return the longest context; None where the samples have lengths of their own."""
        return Context("--length", settings.length)

    def check_context(self, settings: Settings, limit: int | None) -> None:
        """Raise EvaluationError for contexts beyond the model's limit in tokens."""
        context = self.context(settings)
        if context is not None and limit is not None and context.tokens > limit:
            raise EvaluationError(f"{context.option} {context.tokens} is more than the model's limit of {limit} tokens")

    def longer(self, settings: Settings) -> str:
        """Return advice for contexts that are longer than a plan's window."""
        context = self.context(settings)
        return "ask something with longer prompts" if context is None else f"use a larger {context.option}"

    @abstractmethod
    def samples(self, loaded: LoadedModel, settings: Settings) -> Sequence[SampleT]:
        """Return the samples, the same for every row; between one and `limit`. Raises KvmixError."""

    def records(
        self, loaded: LoadedModel, subject: Subject, samples: Sequence[SampleT], settings: Settings
    ) -> Iterator[RecordT | None]:
        """Yield one record for each sample, in their order, and None where other rows should go on first.

        Raises KvmixError.
        """
        for sample in samples:
            yield self.measure(loaded, subject, sample, settings)

    @abstractmethod
    def measure(self, loaded: LoadedModel, subject: Subject, sample: SampleT, settings: Settings) -> RecordT:
        """Put one sample through a fresh cache. Raises KvmixError."""

    @abstractmethod
    def summarise(
        self, records: Sequence[RecordT], reference: Sequence[RecordT] | None, seed: int
    ) -> dict[str, Estimate]:
        """Return the metrics of all samples together.

        Args:
            reference: the unquantized cache's records of the same samples; None for its own row, and if it has none.
        """

    @abstractmethod
    def describe(self, samples: Sequence[SampleT], settings: Settings) -> str:
        """Return a description of the work, for the foot of a table."""

    def notices(self, samples: Sequence[SampleT], settings: Settings) -> tuple[str, ...]:
        """Return remarks about the samples, such as that there are fewer of them than the limit."""
        limit, found = self.limit(settings), len(samples)
        if found >= limit:
            return ()
        return (f"{self.name}: {settings.text} has {counted(found, 'sample')}, not {limit}",)

    def details(self, rows: Sequence[Row]) -> list[Table]:
        """Return tables of all rows beside that of their metrics."""
        return []

    def warnings(self, subject: Subject, metrics: dict[str, Estimate]) -> list[str]:
        """Return warnings about a row, for whoever reads its metrics."""
        return []


def chunks(loaded: LoadedModel, texts: Sequence[str], source: str, length: int, limit: int, seed: int) -> list[Sample]:
    """Return up to `limit` samples of `length` tokens: one of each document in a seeded order, then a second, ...

    Raises:
        TextError: if no document is long enough.
    """
    found = list(islice(_parts(loaded.tokenizer, texts, length, seed), limit))
    if not found:
        longest = len(encode(loaded.tokenizer, max(texts, key=len, default="")))
        raise TextError(
            f"{source}: no document has {length} tokens, the longest has {longest}; "
            "give longer text with --text or a smaller --length"
        )
    return found


def _parts(tokenizer: Any, texts: Sequence[str], length: int, seed: int) -> Iterator[Sample]:
    """Yield all samples that there are; a document is encoded when it is reached, and as far as it is needed."""
    first = opening(tokenizer)
    body = length - len(first)
    order = [index for index, text in enumerate(texts) if len(text.encode()) >= body]
    random.Random(seed).shuffle(order)
    encoded: dict[int, list[int]] = {}
    for part in count():
        longer = []
        end = (part + 1) * body
        for index in order:
            if len(encoded.get(index, ())) < end:
                encoded[index] = beginning(tokenizer, texts[index], end if part == 0 else 2 * end)
            ids = encoded[index][end - body : end]
            if len(ids) == body:
                longer.append(index)
                yield Sample(f"document {index} part {part}", (*first, *ids))
        if not longer:
            return
        order = longer
