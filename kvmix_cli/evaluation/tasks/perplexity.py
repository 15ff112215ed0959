"""Perplexity of text that is read back through the cache."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from ...cache.subject import AttendedPairs, Subject, attended
from ...counting import counted
from ...decoding.feed import feed, prefill
from ...errors import EvaluationError
from ...texts import describe_texts, is_one_document, load_texts
from ..alongside import UnquantizedReading, divergence
from ..base import Sample, Settings, Task, chunks
from ..bootstrap import pooled_quantile, ratio
from ..positions import position_tables
from ..records import PerplexityRecord
from ..results import Estimate, Metric, Row, Table

if TYPE_CHECKING:
    from torch import Tensor

    from ...models.loading import LoadedModel

MAX_LOSS = 100.0
"""Nats a token. A larger loss means that the model produces nonsense, and its exponential says nothing."""
TAIL = 0.99
"""Share of the tokens whose divergence is at most `kl_p99`."""
DIGITS = 6
"""Significant digits of a token's divergence in records."""


class Perplexity(Task[Sample, PerplexityRecord]):
    """A prefix enters the cache and is quantized; then the rest is teacher-forced through the cache, step by step.

    A one-pass forward would attend to unquantized keys and values and measure nothing. Every scored token is predicted
    by a query that went through the cache, so `length - prefix - 1` tokens of a document count. The same predictions
    are compared with the unquantized cache's, which reads the document side by side with the others.
    """

    name = "perplexity"
    metrics = (
        Metric("perplexity", higher_is_better=False),
        Metric("loss_increase", higher_is_better=False, unit="nats", plans_only=True),
        Metric("perplexity_increase_percent", higher_is_better=False, unit="%", plans_only=True),
        Metric("kl", higher_is_better=False, unit="nats/token", plans_only=True),
        Metric("kl_p99", higher_is_better=False, unit="nats/token", plans_only=True),
        Metric("same_token", higher_is_better=True, plans_only=True),
    )
    default_limit = 10
    unread = ()
    side_by_side = True

    def __init__(self) -> None:
        self._latest: UnquantizedReading | None = None

    def longer(self, settings: Settings) -> str:
        return "use a larger --length and --prefix"

    def samples(self, loaded: LoadedModel, settings: Settings) -> list[Sample]:
        if settings.prefix + 2 > settings.length:
            raise EvaluationError(
                f"--prefix {settings.prefix} leaves nothing to score of --length {settings.length}; "
                "it must be smaller by at least 2"
            )
        texts = load_texts(settings.text, held_out=True, seed=settings.seed)
        return chunks(loaded, texts, settings.text, settings.length, self.limit(settings), settings.seed)

    def measure(self, loaded: LoadedModel, subject: Subject, sample: Sample, settings: Settings) -> PerplexityRecord:
        """Return the measurement of one document without pausing between its parts."""
        record = list(self.records(loaded, subject, [sample], settings))[-1]
        assert record is not None
        return record

    def records(
        self, loaded: LoadedModel, subject: Subject, samples: Sequence[Sample], settings: Settings
    ) -> Iterator[PerplexityRecord | None]:
        """Yield one record for each document, and None after each of its parts."""
        for sample in samples:
            yield (yield from self._read(loaded, subject, sample, settings))

    @torch.inference_mode()
    def _read(
        self, loaded: LoadedModel, subject: Subject, sample: Sample, settings: Settings
    ) -> Generator[None, None, PerplexityRecord]:
        """Read one document through a subject's cache, and stop after each part so that other rows can read it."""
        beside = self._unquantized(loaded, sample, settings)
        score = _Score(sample, settings.prefix)
        if subject == Subject():
            for part in beside.parts():
                score.add(part, beside.read(part), None)
                yield
            return score.record(beside.attended)
        cache = subject.cache(loaded.config, reserve=len(sample.ids))
        prefill(loaded, cache, sample.ids[: settings.prefix])
        for part, logits in feed(loaded, cache, sample.ids[settings.prefix : -1], settings.step):
            score.add(part, logits, beside.logits(part))
            yield
        return score.record(attended(cache))

    def _unquantized(self, loaded: LoadedModel, sample: Sample, settings: Settings) -> UnquantizedReading:
        """Return the reading of this sample that other rows have begun, or a new one."""
        if self._latest is None or not self._latest.is_of(loaded, sample.ids, settings.prefix, settings.step):
            self._latest = UnquantizedReading(loaded, sample.ids, settings.prefix, settings.step)
        return self._latest

    def summarise(
        self, records: Sequence[PerplexityRecord], reference: Sequence[PerplexityRecord] | None, seed: int
    ) -> dict[str, Estimate]:
        tokens = [record["tokens"] for record in records]
        metrics = {"perplexity": ratio([record["nll"] for record in records], tokens, seed).map(math.exp)}
        if reference is not None:
            differences = [record["nll"] - other["nll"] for record, other in zip(records, reference, strict=True)]
            increase = ratio(differences, tokens, seed)
            metrics["loss_increase"] = increase
            metrics["perplexity_increase_percent"] = increase.map(lambda nats: 100 * math.expm1(nats))
        if all("kl" in record for record in records):  # records of older versions have none
            kl = [record["kl"] for record in records]
            kept = [count - len(record["changed"]) for count, record in zip(tokens, records, strict=True)]
            metrics["kl"] = ratio([math.fsum(values) for values in kl], tokens, seed)
            metrics["kl_p99"] = pooled_quantile(kl, TAIL, seed)
            metrics["same_token"] = ratio(kept, tokens, seed)
        return metrics

    def describe(self, samples: Sequence[Sample], settings: Settings) -> str:
        scored = sum(len(sample.ids) - settings.prefix - 1 for sample in samples)
        part = "consecutive part" if is_one_document(settings.text) else "document"
        source = describe_texts(settings.text, held_out=True)
        return (
            f"{counted(len(samples), part)} of {settings.length} tokens from {source}: {settings.prefix} prefilled, "
            f"then {scored} in all scored through the cache, {settings.step} at a time"
            + ("; compare with the unquantized row, not with one-pass figures" if source != settings.text else "")
        )

    def details(self, rows: Sequence[Row]) -> list[Table]:
        return position_tables(rows)

    def warnings(self, subject: Subject, metrics: dict[str, Estimate]) -> list[str]:
        if subject == Subject() or "kl" in metrics or "loss_increase" not in metrics:
            return []
        return [
            f"{subject.name}: no KL, because an older version measured some of its samples, or their predictions are "
            "not finite; leave out --resume to measure them anew"
        ]


@dataclass
class _Score:
    """One document's numbers so far.

    Attributes:
        kl: divergence of each scored token's prediction; None once there was nothing to compare one with.
        changed: the scored tokens, counted from 0, whose most likely token is another one than the unquantized cache's.
    """

    sample: Sample
    prefix: int
    nll: float = 0.0
    kl: list[float] | None = field(default_factory=list)
    changed: list[int] = field(default_factory=list)

    def add(self, part: slice, logits: Tensor, reference: Tensor | None) -> None:
        """Add the predictions of a part of the tokens after the prefix, logits `[tokens, vocabulary]`."""
        targets = torch.tensor(self.sample.ids[self.prefix + 1 :][part], device=logits.device)
        self.nll += cross_entropy(logits, targets, reduction="sum").item()
        if reference is None:
            self.kl = None
        if reference is None or self.kl is None:
            return
        self.kl += [float(f"{nats:.{DIGITS}g}") for nats in divergence(reference, logits).tolist()]
        is_other = logits.argmax(-1) != reference.argmax(-1)
        self.changed += [part.start + index for index in is_other.nonzero()[:, 0].tolist()]

    def record(self, pairs: AttendedPairs) -> PerplexityRecord:
        """Return the record of the whole document. Raises EvaluationError for a loss that says nothing."""
        tokens = len(self.sample.ids) - self.prefix - 1
        loss = self.nll / tokens
        if not loss < MAX_LOSS:
            raise EvaluationError(f"the loss on {self.sample.name} is {loss:g} a token; try another --dtype")
        record: PerplexityRecord = {"tokens": tokens, "nll": self.nll, "attended": pairs}
        if self.kl and all(map(math.isfinite, self.kl)):
            record |= {"first": self.prefix + 1, "kl": self.kl, "changed": self.changed}
        return record
