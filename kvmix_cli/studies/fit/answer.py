"""Answers of `kvmix fit`: bytes at a context and batch, and the largest of both that a memory holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import BudgetError, ModelError, PlanError
from ...plan import LayerPlan, ModelInfo, Plan
from ...plan.document.fields import WIDTHS
from ...plan.sizes import format_bytes
from .facts import ModelFacts
from .formats import CacheFormat, LlamaCppFormat, PlanFormat, StockFormat, other_formats
from .roofline import FED_AT_ONCE, MOST_SEQUENCES, MOST_TOKENS, GpuGroup, GpuRow, Roofline, largest

USUAL_WIDTHS = (8, 4, 3, 2)
"""Widths that are shown where nothing is named."""
USUAL_CONTEXT = 32768


@dataclass(frozen=True)
class FitQuestion:
    """The use that memory is counted for.

    Attributes:
        context: tokens in the cache.
        batch: sequences.
        memory: bytes that there are; None if that is not asked.
        element_bytes: of keys and values that are not quantized, and of activations.
        weights_dtype: of the weights; None as they are stored.
        at_once: tokens of a prompt that our cache, or transformers', is fed at once; None for all.
        images: that a model with cross-attention reads.
        gpus: GPUs that hold the model together; None if that is not asked.
    """

    context: int
    batch: int = 1
    memory: int | None = None
    element_bytes: int = 2
    weights_dtype: str | None = None
    at_once: int | None = None
    images: int = 0
    gpus: GpuGroup | None = None


def usual_context(facts: ModelFacts, context: int | None) -> int:
    """Return a context, by default 32K or all that the model was made for if that is less.

    Raises:
        ModelError: for more than it was made for.
    """
    limit = facts.max_length
    if context is None:
        return USUAL_CONTEXT if limit is None else min(USUAL_CONTEXT, limit)
    if limit is not None and context > limit:
        raise ModelError(
            f"--context {context} is more than the {limit} tokens that {facts.info.id} was made for, as its "
            "configuration says (max_position_embeddings)"
        )
    return context


@dataclass(frozen=True)
class FitRow:
    """The memory of one format.

    Attributes:
        format: the format.
        by_kind: bytes of the cache, by kind of layer.
        activation_bytes: peak of a prompt's activations, an estimate.
        total_bytes: weights, activations and cache.
        max_context: most tokens, at the batch asked for; None without a memory.
        max_batch: most sequences, at the context asked for.
        fault: why the format does not take this model; None if it does.
        on_gpus: memory and speed on GPUs; None where that is not asked, or the format is not shared by heads.
    """

    format: CacheFormat
    by_kind: dict[str, int]
    activation_bytes: int
    total_bytes: int
    max_context: int | None = None
    max_batch: int | None = None
    fault: str | None = None
    on_gpus: GpuRow | None = None

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the cache."""
        return sum(self.by_kind.values())

    def fits(self, memory: int | None) -> bool | None:
        """Return whether it all fits into a memory; None without one."""
        return None if memory is None else self.fault is None and self.total_bytes <= memory


@dataclass(frozen=True)
class FitAnswer:
    """The memory of all formats.

    Attributes:
        facts: the model.
        question: what was asked.
        weights_bytes: bytes of the weights.
        rows: the unquantized cache, plans, then the formats of others.
        left: bytes that the memory leaves for the layers that a plan decides about; None without a memory.
    """

    facts: ModelFacts
    question: FitQuestion
    weights_bytes: int
    rows: tuple[FitRow, ...]
    left: int | None

    @property
    def needed_bits(self) -> float | None:
        """Return the mean bits of a planned element, window and scales included, that there is room for."""
        elements = _elements(self.facts) * self.question.context * self.question.batch
        return None if self.left is None else max(0.0, 8 * self.left / elements)


def answer(facts: ModelFacts, plans: dict[str, Plan], question: FitQuestion) -> FitAnswer:
    """Return the memory that a model takes with each plan, and in other formats.

    Raises:
        BudgetError: if the memory does not hold the weights, or GPUs cannot share the KV heads.
    """
    weights = facts.weights.at(question.weights_dtype)
    if question.memory is not None and question.memory < weights:
        raise BudgetError(
            f"{facts.info.id} needs {format_bytes(weights)} for weights alone, and {format_bytes(question.memory)} are "
            "there: use a smaller model, or weights of fewer bits (--weights-dtype)"
        )
    how = facts, question.element_bytes, question.at_once
    ours = [PlanFormat(name, *how, plan=plan) for name, plan in plans.items()]
    formats = [StockFormat("unquantized", *how), *ours, *other_formats(*how)]
    rows = tuple(_row(each, question, weights) for each in formats)
    return FitAnswer(facts, question, weights, rows, _left(facts, question, weights))


def _row(form: CacheFormat, question: FitQuestion, weights: int) -> FitRow:
    fault = form.fault if isinstance(form, LlamaCppFormat) else None
    context, batch, memory = question.context, question.batch, question.memory
    activations = activation_bytes(form, question, context, batch)
    by_kind = form.by_kind(context, batch, question.images)
    total = weights + activations + sum(by_kind.values())
    on_gpus = _on_gpus(form, question, weights)
    if memory is None or fault is not None:
        return FitRow(form, by_kind, activations, total, fault=fault, on_gpus=on_gpus)

    def needed(context: int, batch: int) -> int:
        return weights + max(
            activation_bytes(form, question, each, batch) + form.cache_bytes(each, batch, question.images)
            for each in form.fullest(context)
        )

    limit = form.facts.max_length or MOST_TOKENS
    longest = largest(limit, lambda context: needed(context, batch) <= memory)
    most = largest(MOST_SEQUENCES, lambda batch: needed(context, batch) <= memory)
    return FitRow(form, by_kind, activations, total, longest, most, on_gpus=on_gpus)


def activation_bytes(form: CacheFormat, question: FitQuestion, context: int, batch: int) -> int:
    """Return the peak of the activations of a prompt, an estimate."""
    tokens = context if form.at_once is None else min(context, form.at_once)
    return form.facts.activations.peak(tokens, batch, question.element_bytes, context)


def _on_gpus(form: CacheFormat, question: FitQuestion, weights: int) -> GpuRow | None:
    if question.gpus is None:
        return None
    facts, dtype = form.facts, question.weights_dtype
    roofline = Roofline(
        facts,
        question.gpus,
        weights,
        question.element_bytes,
        FED_AT_ONCE if question.at_once is None else question.at_once,
        question.images,
        is_fp8=dtype == "float8" if dtype is not None else facts.weights.is_fp8,
    )
    return roofline.row(form, question.context, question.batch)


def _left(facts: ModelFacts, question: FitQuestion, weights: int) -> int | None:
    if question.memory is None:
        return None
    context, batch, size = question.context, question.batch, question.element_bytes
    stock = StockFormat("", facts, size, question.at_once)
    other = stock.cache_bytes(context, batch, question.images) - _elements(facts) * context * batch * size
    return question.memory - weights - activation_bytes(stock, question, context, batch) - other


def _elements(facts: ModelFacts) -> int:
    """Return the elements of one token in all layers that a plan decides about."""
    return sum(layer.heads.token_elements for layer in facts.layers if layer.is_planned and layer.heads is not None)


def usual_plans(info: ModelInfo) -> dict[str, Plan]:
    """Return plans of the same width everywhere, as far as the model's heads can be packed."""
    found = {}
    for bits in USUAL_WIDTHS:
        try:
            found[f"uniform-{bits}"] = Plan.uniform(info, bits, bits)
        except PlanError:
            continue
    return found


def average_plan(info: ModelInfo, bits: float) -> Plan:
    """Return a plan whose nominal bits are as near to a mean as two widths allow, and not above it.

    Which layers have the wider one is not decided by any score: bytes do not depend on it where layers are alike.

    Raises:
        BudgetError: for a mean that is below the narrowest width.
    """
    if not WIDTHS[0] <= bits <= WIDTHS[-1]:
        raise BudgetError(f"--avg-bits {bits:g}: plans have {WIDTHS[0]} to {WIDTHS[-1]} bits")
    low = max(width for width in WIDTHS if width <= bits)
    high = min((width for width in WIDTHS if width > low), default=low)

    def plan(wide: int) -> Plan:
        layers = {
            layer: LayerPlan.of_bits(*(2 * [high if place < wide else low]))
            for place, layer in enumerate(info.quantizable)
        }
        return Plan.build(info, layers, provenance={"method": "average"})

    count = len(info.quantizable)
    most = bisect_right(range(1, count + 1), bits + 1e-9, key=lambda wide: plan(wide).bits.nominal) if high > low else 0
    return plan(most)


def widest(rows: Sequence[FitRow], memory: int | None) -> FitRow | None:
    """Return the plan with most bits that fits; None if none does, or without a memory."""
    fitting = [row for row in rows if isinstance(row.format, PlanFormat) and row.fits(memory)]
    return max(fitting, key=lambda row: row.format.bits[1], default=None)
