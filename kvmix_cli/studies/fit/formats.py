"""Bytes of a cache by format: a plan's, transformers' own, and the blocks of vLLM and llama.cpp.

Those of a plan and of transformers are exact, and tested against tensors. Those of the others follow their sources:
vLLM 0.32.0, `vllm/v1/kv_cache_interface.py`; llama.cpp, `src/llama-kv-cache.cpp` and `src/llama-kv-cache-iswa.cpp`.
What both of them keep beside keys and values (recurrent states, indexers) is counted as transformers keeps it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from kvmix_kernels.layout import FULL_PRECISION_BITS

from ...plan import LayerPlan, Plan
from ...plan.engines.formats import GGML, GGML_BLOCK
from ...plan.sizes import fullest_contexts, layer_bytes
from .facts import ModelFacts

if TYPE_CHECKING:
    from ...models.stock import StockLayer

VLLM_BLOCK = 16
"""Tokens of a block."""
VLLM_BATCHED = 8192
"""Tokens of a prompt that vLLM feeds at once by default."""
LLAMA_CPP_PAD = 256
"""Cells that a context is rounded up to."""
LLAMA_CPP_BATCHED = 512
"""Tokens that llama.cpp feeds at once by default, which a layer with a window makes room for."""


@dataclass(frozen=True)
class CacheFormat(ABC):
    """A way to store the keys and values of a model.

    Attributes:
        name: of the row.
        facts: the model.
        element_bytes: of a number that is not quantized.
        at_once: tokens of a prompt that are fed at once; None for all.
    """

    name: str
    facts: ModelFacts
    element_bytes: int
    at_once: int | None

    engine: ClassVar[str]

    @property
    @abstractmethod
    def bits(self) -> tuple[float, float]:
        """Return nominal and stored bits."""

    @abstractmethod
    def layer_bytes(self, layer: StockLayer, plan: LayerPlan | None, context: int, batch: int, images: int) -> int:
        """Return the bytes of one layer at the end of a context.

        Args:
            plan: storage of its keys and values in a plan; None for layers, and formats, without one.
            images: that a layer of cross-attention keeps.
        """

    @property
    def plans(self) -> Mapping[int, LayerPlan]:
        """Return the storage of layers in a plan; none for formats that are no plans."""
        return {}

    @cached_property
    def layers(self) -> Counter[tuple[StockLayer, LayerPlan | None]]:
        """Return the number of layers that are stored alike."""
        return Counter((layer, self.plans.get(index)) for index, layer in enumerate(self.facts.layers))

    def by_kind(self, context: int, batch: int, images: int = 0) -> dict[str, int]:
        """Return the bytes of all layers of a kind."""
        found: Counter[str] = Counter()
        for (layer, plan), count in self.layers.items():
            found[layer.kind] += count * self.layer_bytes(layer, plan, context, batch, images)
        return dict(found)

    def cache_bytes(self, context: int, batch: int, images: int = 0) -> int:
        """Return the bytes of the cache at the end of a context."""
        return sum(self.by_kind(context, batch, images).values())

    def fullest(self, context: int) -> set[int]:
        """Return the contexts up to this one, one of which takes most: this one, where bytes only rise."""
        return {context}


@dataclass(frozen=True)
class PlanFormat(CacheFormat):
    """Our cache with a plan, after packing; layers that are not planned as transformers keeps them."""

    plan: Plan
    engine = "kvmix"

    @property
    def bits(self) -> tuple[float, float]:
        return self.plan.bits.nominal, self.plan.bits.stored

    @property
    def plans(self) -> Mapping[int, LayerPlan]:
        return self.plan.layers

    def layer_bytes(self, layer: StockLayer, plan: LayerPlan | None, context: int, batch: int, images: int) -> int:
        if plan is None or layer.heads is None:
            return layer.nbytes(context, batch, self.element_bytes, images)
        kept = layer_bytes(plan, self.plan.cache, layer.heads, context, batch, self.element_bytes)
        return kept.total + layer.side_bytes(context, batch, self.element_bytes)

    def fullest(self, context: int) -> set[int]:
        """Return this context, and the last one before each of the latest packings: a page in 16 bits is larger."""
        plans = {plan for _, plan in self.layers if plan is not None}
        return {context}.union(*(fullest_contexts(plan, self.plan.cache, context) for plan in plans))


@dataclass(frozen=True)
class StockFormat(CacheFormat):
    """transformers' DynamicCache in the dtype of the model; with `cast_bytes`, keys and values in a smaller one.

    What a layer keeps beside keys and values (a state, an indexer) is never cast, and neither is such a layer.
    """

    cast_bytes: int | None = None
    engine = "transformers"

    @property
    def bits(self) -> tuple[float, float]:
        bits = FULL_PRECISION_BITS if self.cast_bytes is None else 8 * self.cast_bytes
        return bits, bits

    def layer_bytes(self, layer: StockLayer, plan: LayerPlan | None, context: int, batch: int, images: int) -> int:
        is_cast = self.cast_bytes is not None and layer.is_planned and not layer.keeps_more
        size = self.cast_bytes if is_cast and self.cast_bytes is not None else self.element_bytes
        return layer.nbytes(context, batch, size, images)


@dataclass(frozen=True)
class VllmFormat(CacheFormat):
    """Blocks of vLLM: 16 tokens of keys and values, in the dtype of the model or in fp8.

    A layer with a window holds the blocks that its window touches; a prompt in work holds up to 8192 tokens more.
    Latents are one head without values. Groups of layers that vLLM pads to one size are not.
    """

    number_bytes: int
    engine = "vllm"

    @property
    def bits(self) -> tuple[float, float]:
        return 8 * self.number_bytes, 8 * self.number_bytes

    def layer_bytes(self, layer: StockLayer, plan: LayerPlan | None, context: int, batch: int, images: int) -> int:
        beside = layer.side_bytes(context, batch, self.element_bytes)
        if layer.heads is None:
            return beside
        blocks = -(-layer.tokens(context, images) // VLLM_BLOCK)
        if layer.window is not None:
            blocks = min(-(-context // VLLM_BLOCK), -(-layer.window // VLLM_BLOCK) + 1)
        return batch * blocks * VLLM_BLOCK * layer.heads.token_elements * self.number_bytes + beside


@dataclass(frozen=True)
class LlamaCppFormat(CacheFormat):
    """Cells of llama.cpp in one of its types for keys and values, made for the whole context at the start.

    The context is rounded up to 256 cells. A layer with a window has cells for the window and one batch of tokens.
    Latents are keys without values.
    """

    type: str
    engine = "llama.cpp"

    @property
    def bits(self) -> tuple[float, float]:
        form = GGML[self.type]
        return float(form.bits), form.stored_bits(GGML_BLOCK)

    @property
    def fault(self) -> str | None:
        """Return why llama.cpp does not store this model's cache in this type; None if it does."""
        dims = {
            dim for layer in self.facts.layers if layer.heads for dim in (layer.heads.key_dim, layer.heads.value_dim)
        }
        odd = sorted(dim for dim in dims if dim % GGML_BLOCK)
        if self.type == "f16" or not odd:
            return None
        return f"heads of {odd[0]} channels are not whole blocks of {GGML_BLOCK}"

    def layer_bytes(self, layer: StockLayer, plan: LayerPlan | None, context: int, batch: int, images: int) -> int:
        beside = layer.side_bytes(context, batch, self.element_bytes)
        if layer.heads is None:
            return beside
        cells = layer.tokens(context, images) if layer.image_tokens is not None else context
        cells = _padded(cells)
        if layer.window is not None:
            cells = _padded(min(cells, layer.window + 1 + LLAMA_CPP_BATCHED))
        return batch * cells * layer.heads.token_elements * GGML[self.type].nbytes(GGML_BLOCK) // GGML_BLOCK + beside


def _padded(cells: int) -> int:
    return -(-cells // LLAMA_CPP_PAD) * LLAMA_CPP_PAD


def other_formats(facts: ModelFacts, element_bytes: int, at_once: int | None) -> list[CacheFormat]:
    """Return the formats that plans are compared with: fp8, and those of vLLM and llama.cpp."""
    both = facts, element_bytes
    found: list[CacheFormat] = [
        StockFormat("fp8", *both, at_once, cast_bytes=1),
        VllmFormat("vllm-bf16", *both, VLLM_BATCHED, number_bytes=2),
        VllmFormat("vllm-fp8", *both, VLLM_BATCHED, number_bytes=1),
    ]
    return found + [LlamaCppFormat(f"llama.cpp-{name}", *both, LLAMA_CPP_BATCHED, name) for name in GGML]
