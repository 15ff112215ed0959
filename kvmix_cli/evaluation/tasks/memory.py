"""Memory: bytes of the cache of a long context, beside the prediction of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...cache.mixed import MixedCache
from ...cache.sizes import cache_nbytes
from ...cache.subject import Subject, attended
from ...counting import counted
from ...decoding.feed import feed, prefill
from ...errors import EvaluationError
from ...models.memory import devices, watch
from ...texts import load_texts
from ..base import Sample, Settings, Task, chunks
from ..bootstrap import ratio
from ..records import MemoryRecord
from ..results import Estimate, Metric

if TYPE_CHECKING:
    from transformers import Cache

    from ...models.loading import LoadedModel
    from ...plan import Plan

TOLERANCE_PERCENT = 1.0
"""A prediction that is off by more is a bug."""
SHORTEST = 2
"""Tokens of a context: all but the last are prefilled, and the last one is decoded."""
WARM_UP = 65
"""Tokens of a cache that is filled first, so that what is loaded or set up once is in no peak. All but one are
prefilled: whole groups for any cache that cuts keys and values into groups of 64."""
REFERENCE_ELEMENT_BYTES = 2
"""Compression is against 16 bits, also where a float32 model makes everything unquantized twice as big."""


class Memory(Task[Sample, MemoryRecord]):
    """A context is prefilled and one token is decoded, by which time the window has been applied to the context.

    Bytes are counted from the tensors in use; `allocated_bytes` has the room to grow as well. `peak_bytes` is the most
    that the whole work took above the model, activations of the prompt included; see `models.memory.watch`.
    """

    name = "memory"
    metrics = (
        Metric("measured_bytes", higher_is_better=False, unit="bytes"),
        Metric("allocated_bytes", higher_is_better=False, unit="bytes"),
        Metric("peak_bytes", higher_is_better=False, unit="bytes"),
        Metric("predicted_bytes", higher_is_better=False, unit="bytes", plans_only=True),
        Metric("prediction_error_percent", higher_is_better=False, unit="%", plans_only=True),
        Metric("bf16_bytes", higher_is_better=False, unit="bytes"),
        Metric("compression", higher_is_better=True, unit="x"),
    )
    default_limit = 1
    unread = ("prefix", "step")
    is_local = True

    def samples(self, loaded: LoadedModel, settings: Settings) -> list[Sample]:
        if settings.length < SHORTEST:
            raise EvaluationError(f"--length must be at least {SHORTEST} for memory, got {settings.length}")
        texts = load_texts(settings.text, held_out=True, seed=settings.seed)
        return chunks(loaded, texts, settings.text, settings.length, self.limit(settings), settings.seed)

    @torch.inference_mode()
    def measure(self, loaded: LoadedModel, subject: Subject, sample: Sample, settings: Settings) -> MemoryRecord:
        """Return the bytes of a cache that holds the sample, and the most that was taken meanwhile."""
        _fill(loaded, subject, sample.ids[:WARM_UP])
        with watch(devices(loaded.model)) as peak:
            cache = _fill(loaded, subject, sample.ids)
        element_bytes = loaded.model.dtype.itemsize
        record: MemoryRecord = {
            "tokens": len(sample.ids),
            "element_bytes": element_bytes,
            "measured": cache_nbytes(cache),
            "allocated": cache.allocated_bytes if isinstance(cache, MixedCache) else cache_nbytes(cache),
            "attended": attended(cache),
        }
        if peak.bytes is not None:
            record["peak"] = peak.bytes
        if subject == Subject():
            record["unquantized"] = True
        if subject.plan is not None:
            record["planned"] = _planned_bytes(subject.plan, cache)
            record["predicted"] = predicted_bytes(subject.plan, len(sample.ids) - 1, element_bytes)
        return record

    def summarise(
        self, records: Sequence[MemoryRecord], reference: Sequence[MemoryRecord] | None, seed: int
    ) -> dict[str, Estimate]:
        def mean(values: Sequence[float]) -> Estimate:
            return ratio(values, [1.0] * len(values), seed)

        measured = [record["measured"] for record in records]
        metrics = {
            "measured_bytes": mean(measured),
            "allocated_bytes": mean([record["allocated"] for record in records]),
        }
        if all("peak" in record for record in records):
            metrics["peak_bytes"] = mean([record["peak"] for record in records])
        if "predicted" in records[0]:
            planned, predicted = ([record[key] for record in records] for key in ("planned", "predicted"))
            stock = [total - part for total, part in zip(measured, planned, strict=True)]
            metrics["predicted_bytes"] = mean([part + rest for part, rest in zip(predicted, stock, strict=True)])
            metrics["prediction_error_percent"] = ratio(
                [100 * (guess - part) for guess, part in zip(predicted, planned, strict=True)], planned, seed
            )
        full = records if "unquantized" in records[0] else reference
        if full is not None:
            bf16 = [record["measured"] * REFERENCE_ELEMENT_BYTES / record["element_bytes"] for record in full]
            metrics["bf16_bytes"] = mean(bf16)
            metrics["compression"] = ratio(bf16, measured, seed)
        return metrics

    def describe(self, samples: Sequence[Sample], settings: Settings) -> str:
        return (
            f"{counted(len(samples), 'context')} of {settings.length} tokens, the last one of each decoded; "
            "compression is against 16 bits; the peak is above the model, with the prompt's activations"
        )

    def warnings(self, subject: Subject, metrics: dict[str, Estimate]) -> list[str]:
        error = metrics.get("prediction_error_percent")
        if error is None or abs(error.value) <= TOLERANCE_PERCENT:
            return []
        return [
            f"{subject.name}: the plan's prediction is off by {error.value:+.2f} %, more than {TOLERANCE_PERCENT:g} %; "
            "please report it, with the plan"
        ]


def predicted_bytes(plan: Plan, context: int, element_bytes: int) -> int:
    """Return the bytes predicted for the planned layers: a context, and one decoded token in full precision."""
    answer = plan.unquantized_bytes(1, element_bytes=element_bytes)
    return plan.cache_bytes(context, element_bytes=element_bytes).total + answer


def _fill(loaded: LoadedModel, subject: Subject, ids: Sequence[int]) -> Cache:
    """Return a cache into which all but the last token went at once, and then the last one."""
    cache = subject.cache(loaded.config, reserve=len(ids))
    prefill(loaded, cache, ids[:-1])
    for _ in feed(loaded, cache, ids[-1:], step=1):
        pass
    return cache


def _planned_bytes(plan: Plan, cache: Cache) -> int:
    """Return the bytes in use by the planned layers."""
    return sum(cache.layers[index].nbytes for index in plan.layers)
