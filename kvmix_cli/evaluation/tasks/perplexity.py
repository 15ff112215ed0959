"""Perplexity of text that is read back through the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...cache.subject import Subject, attended
from ...decoding.feed import document_loss
from ...errors import EvaluationError
from ...texts import describe_texts, is_one_document, load_texts
from ..base import Sample, Settings, Task, chunks
from ..bootstrap import ratio
from ..records import PerplexityRecord
from ..results import Estimate, Metric, counted

if TYPE_CHECKING:
    from ...models.loading import LoadedModel

MAX_LOSS = 100.0
"""Nats a token. A larger loss means that the model produces nonsense, and its exponential says nothing."""


class Perplexity(Task[Sample, PerplexityRecord]):
    """A prefix enters the cache and is quantized; then the rest is teacher-forced through the cache, step by step.

    A one-pass forward would attend to unquantized keys and values and measure nothing. Every scored token is predicted
    by a query that went through the cache, so `length - prefix - 1` tokens of a document count.
    """

    name = "perplexity"
    metrics = (
        Metric("perplexity", higher_is_better=False),
        Metric("loss_increase", higher_is_better=False, unit="nats", plans_only=True),
        Metric("perplexity_increase_percent", higher_is_better=False, unit="%", plans_only=True),
    )
    default_limit = 10

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
        """Return the negative log-likelihood (nats) of a document's scored tokens."""
        cache = subject.cache(loaded.config, reserve=len(sample.ids))
        loss = document_loss(loaded, cache, sample.ids, settings.prefix, settings.step)
        tokens = len(sample.ids) - settings.prefix - 1
        if not loss / tokens < MAX_LOSS:
            raise EvaluationError(f"the loss on {sample.name} is {loss / tokens:g} a token; try another --dtype")
        return {"tokens": tokens, "nll": loss, "attended": attended(cache)}

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
