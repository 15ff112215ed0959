"""Memory and speed on GPUs that share a model by tensor parallelism: a roofline. docs/scale.md has its assumptions.

With t GPUs, W bytes of weights, P parameters, C bytes of the cache of one GPU, batch B and context T, a step of
decoding takes

    max((W / t + C) / bandwidth, (2 P + 4 q T) B / t / products) + 4 l (t - 1) / t * B h e / link

seconds: everything is read once, or multiplied, whichever takes longer; then each of l layers adds up hidden states of
h elements of e bytes in two rings. q is the queries' elements of a token, summed over layers. A prompt takes
`(2 P T + 2 q T^2) / t / products` seconds at least. Source of the bound: Williams et al. 2009; of its use for decoding:
Pope et al. 2022 (arXiv 2211.05102).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ...errors import BudgetError
from ...plan import HeadGeometry, LayerPlan, TransformTensor
from ...plan.layers import AnyTensor
from .facts import ModelFacts
from .formats import CacheFormat, LlamaCppFormat
from .gpus import GB, Gpu

USABLE = 0.9
"""Share of a GPU's memory that weights, activations and cache may take."""
FED_AT_ONCE = 8192
"""Tokens of a prompt that are fed at once."""
MACHINE = 8
"""GPUs that are linked within a machine."""
NETWORK = 50 * GB
"""Bytes a second from a GPU to one in another machine: 400 Gbit/s."""
MOST_TOKENS = 2**31 - 1
MOST_SEQUENCES = 2**20


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to a limit that fits, given that what fits has no gap; 0 if none does."""
    return bisect_right(range(1, limit + 1), 0, key=lambda number: 0 if fits(number) else 1)


@dataclass(frozen=True)
class GpuGroup:
    """GPUs that hold one copy of a model together.

    Attributes:
        key: name of the GPU, as options take it.
        gpu: one of them.
        count: GPUs, the degree of tensor parallelism.
    """

    key: str
    gpu: Gpu
    count: int = 1

    def heads(self, heads: HeadGeometry) -> HeadGeometry:
        """Return the KV heads of one GPU: a part of them, or one where there are more GPUs than heads, as in vLLM.

        Raises:
            BudgetError: if heads can be neither split nor repeated evenly.
        """
        if heads.kv_heads % self.count and self.count % heads.kv_heads:
            raise BudgetError(
                f"--tp {self.count} neither divides {heads.kv_heads} KV heads nor is a multiple of them, and each GPU "
                f"needs as many; use {', '.join(str(each) for each in _even(heads.kv_heads))}"
            )
        return heads.model_copy(update={"kv_heads": max(1, heads.kv_heads // self.count)})

    def copies(self, heads: HeadGeometry) -> int:
        """Return the number of GPUs that keep the same KV head."""
        return max(1, self.count // heads.kv_heads)

    @property
    def link(self) -> float:
        """Return the bytes a second of the slowest link between two neighbours."""
        return self.gpu.link if self.count <= MACHINE else min(self.gpu.link, NETWORK)


@dataclass(frozen=True)
class GpuRow:
    """The memory and the speed of one format on a group of GPUs.

    Attributes:
        cache_bytes: of the cache, on one GPU: the one that has most.
        total_bytes: on one GPU, with weights and activations.
        fits: it is no more than what may be used.
        max_context, max_batch: most tokens at the batch asked for, and most sequences at the context.
        step_seconds: of decoding a token of each sequence.
        bound: what the step waits for, "memory", "products" or "links".
        tokens_per_s: of all sequences together.
        max_tokens_per_s: the same with the largest batch; None if none fits.
        prefill_seconds: of one prompt of the whole context.
    """

    cache_bytes: int
    total_bytes: int
    fits: bool
    max_context: int
    max_batch: int
    step_seconds: float
    bound: str
    tokens_per_s: float
    max_tokens_per_s: float | None
    prefill_seconds: float


@dataclass(frozen=True)
class Roofline:
    """A model on a group of GPUs.

    Attributes:
        facts: the model.
        group: the GPUs.
        weights_bytes: of all weights.
        element_bytes: of hidden states.
        at_once: tokens of a prompt that are fed at once.
        images: that a model with cross-attention reads.
        is_fp8: weights are fp8, and so are the products with them.
    """

    facts: ModelFacts
    group: GpuGroup
    weights_bytes: int
    element_bytes: int = 2
    at_once: int = FED_AT_ONCE
    images: int = 0
    is_fp8: bool = False

    @property
    def flops(self) -> float:
        """Return the products and sums a second of one GPU; those of attention are counted as fast as the others."""
        return self.group.gpu.fp8_flops if self.is_fp8 else self.group.gpu.flops

    def row(self, form: CacheFormat, context: int, batch: int) -> GpuRow | None:
        """Return a format's row; None for one that is not split by heads, or does not take the model.

        Raises:
            BudgetError: if the KV heads cannot be shared.
        """
        if isinstance(form, LlamaCppFormat) and (self.group.count > 1 or form.fault is not None):
            return None
        room = int(USABLE * self.group.gpu.memory)
        limit = self.facts.max_length or MOST_TOKENS
        total = self.total_bytes(form, context, batch)
        most = largest(MOST_SEQUENCES, lambda number: self._peak(form, context, number) <= room)
        seconds, bound = self.step(form, context, batch)
        return GpuRow(
            cache_bytes=self.cache_bytes(form, context, batch),
            total_bytes=total,
            fits=total <= room,
            max_context=largest(limit, lambda number: self._peak(form, number, batch) <= room),
            max_batch=most,
            step_seconds=seconds,
            bound=bound,
            tokens_per_s=batch / seconds,
            max_tokens_per_s=most / self.step(form, context, most)[0] if most else None,
            prefill_seconds=self.prefill_seconds(context),
        )

    def cache_bytes(self, form: CacheFormat, context: int, batch: int) -> int:
        """Return the bytes of the cache on the GPU that has most; what is not keys and values is on every GPU."""
        return max(self._of_ranks(form, context, batch))

    def _of_ranks(self, form: CacheFormat, context: int, batch: int) -> Iterator[int]:
        """Yield the bytes of each GPU that may differ: those of transform codes do, as heads have other widths."""
        ranks = self.group.count if any(plan is not None and plan.is_coded for _, plan in form.layers) else 1
        for rank in range(ranks):
            total = 0
            for (layer, plan), number in form.layers.items():
                heads = layer.heads
                if heads is not None:
                    plan = None if plan is None else self._of_rank(plan, heads, rank)
                    layer = replace(layer, heads=self.group.heads(heads))
                total += number * form.layer_bytes(layer, plan, context, batch, self.images)
            yield total

    def _of_rank(self, plan: LayerPlan, heads: HeadGeometry, rank: int) -> LayerPlan:
        """Return the storage of a rank's KV heads."""
        held = self.group.heads(heads).kv_heads
        first = rank // self.group.copies(heads) * held

        def part(tensor: AnyTensor) -> AnyTensor:
            if not isinstance(tensor, TransformTensor):
                return tensor
            return tensor.model_copy(update={"widths": tensor.widths[first : first + held]})

        return plan.model_copy(update={"k": part(plan.k), "v": part(plan.v)})

    def total_bytes(self, form: CacheFormat, context: int, batch: int) -> int:
        """Return the bytes on one GPU: its weights, a prompt's activations whole, and its cache."""
        tokens = min(context, self.at_once)
        activations = self.facts.activations.peak(tokens, 1, self.element_bytes, context)
        return -(-self.weights_bytes // self.group.count) + activations + self.cache_bytes(form, context, batch)

    def _peak(self, form: CacheFormat, context: int, batch: int) -> int:
        return max(self.total_bytes(form, each, batch) for each in form.fullest(context))

    def step(self, form: CacheFormat, context: int, batch: int) -> tuple[float, str]:
        """Return the seconds of a step of decoding, and what it waits for."""
        gpu, count, sizes = self.group.gpu, self.group.count, self.facts.activations
        reads = (self.weights_bytes / count + self.cache_bytes(form, context, batch)) / gpu.bandwidth
        attended = sum(layer.tokens(context, self.images) for layer in self.facts.layers if layer.heads is not None)
        products = (2 * self.facts.weights.parameters + 4 * sizes.queries * attended) * batch / count / self.flops
        ring = 2 * (count - 1) / count * batch * sizes.hidden * self.element_bytes / self.group.link
        links = 2 * len(self.facts.layers) * ring
        times = {"memory": reads, "products": products, "links": links}
        bound = "links" if links > max(reads, products) else max(("memory", "products"), key=times.__getitem__)
        return max(reads, products) + links, bound

    def prefill_seconds(self, context: int) -> float:
        """Return the seconds that the products of a whole prompt take at least."""
        queries = self.facts.activations.queries
        attended = sum(layer.tokens(context, self.images) for layer in self.facts.layers if layer.heads is not None)
        products = 2 * self.facts.weights.parameters * context + 2 * queries * context * attended
        return products / self.group.count / self.flops


def _even(heads: int) -> list[int]:
    """Return the degrees of tensor parallelism that share so many heads evenly."""
    return [each for each in range(1, heads + 1) if heads % each == 0] + [2 * heads]
