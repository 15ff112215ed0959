"""Bits and bytes, all from `kvmix_kernels.layout.PageLayout` and the forms that a plan's settings ask for. No torch.

Two counts, always shown together:

    nominal   bits of the codes alone, the papers' convention; a token that is evicted has none
    stored    bits of what lies between sinks and window: codes, scales and zeros, the map of tiers, orders of channels

What a context really takes also has its sinks, its window, the tokens that wait to be packed, and what a method keeps
of a sequence; `cache_bytes` counts those too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvmix_kernels.layout import FULL_PRECISION_BITS, Kind, PageLayout

from .forms import Form, forms, run

if TYPE_CHECKING:
    from .plan import CacheSettings, LayerPlan, ModelInfo, Plan, TensorPlan

Count = Literal["nominal", "stored"]
INDEX_BYTES = 1
"""Of the tier of a token, and of the place of a channel: uint8."""
STATISTIC_BYTES = 4
"""Of what a method keeps of a token or of a channel: float32."""
OVER_QUERIES = 2
"""Of a sum over queries there are two parts: that of the last forward is apart, so that it can be taken back."""


def page_layout(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int) -> PageLayout | None:
    """The page layout of a layer's keys or values at the layer's own bits; None if they stay in full precision.

    Raises:
        ValueError: if the head cannot be packed (its size is no multiple of 16).
    """
    layout = run(tensor, kind, cache, head_dim)
    return layout if isinstance(layout, PageLayout) else None


def page_bytes(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int) -> int:
    """Bytes of one page of one KV head at the layer's own bits: packed, or in 16 bits if it is never packed."""
    layout = page_layout(tensor, kind, cache, head_dim)
    return cache.page * head_dim * FULL_PRECISION_BITS // 8 if layout is None else layout.nbytes


def tensor_bits(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int, count: Count) -> float:
    """Bits per element of a layer's keys or values, over all tokens that have left the window.

    Raises:
        ValueError: if the head, or a run of its channels, cannot be packed.
    """
    of_form = _nominal_bits if count == "nominal" else _stored_bits
    bits = sum(float(form.share) * of_form(form, cache, head_dim) for form in forms(tensor, kind, cache, head_dim))
    half_a_map = 8 * INDEX_BYTES / (2 * head_dim)
    return bits if cache.tokens is None or count == "nominal" else bits + half_a_map


def _nominal_bits(form: Form, cache: CacheSettings, head_dim: int) -> float:
    parts = [FULL_PRECISION_BITS * part if isinstance(part, int) else part.bits * part.head_dim for part in form.runs]
    return sum(parts) / head_dim


def _stored_bits(form: Form, cache: CacheSettings, head_dim: int) -> float:
    parts = [
        FULL_PRECISION_BITS * part if isinstance(part, int) else part.stored_bits * part.head_dim for part in form.runs
    ]
    refresh = cache.channels.refresh if cache.channels and form.is_sorted else 0
    return sum(parts) / head_dim + (8 * INDEX_BYTES / refresh if refresh else 0)


def mean_bits(
    layers: Mapping[int, LayerPlan],
    cache: CacheSettings,
    model: ModelInfo,
    count: Count,
    kind: Kind | None = None,
) -> float:
    """Mean bits per element over layers, of keys, of values, or (by default) of both."""
    bits = [
        tensor_bits(tensor, of, cache, model.head_dim, count)
        for layer in layers.values()
        for tensor, of in layer.tensors
        if kind in (None, of)
    ]
    return sum(bits) / len(bits) if bits else 0.0


@dataclass(frozen=True)
class CacheBytes:
    """What a cache takes, in bytes.

    Attributes:
        packed: codes, scales and zeros.
        full: what is in full precision: sinks, tail, tiers and runs of 16 bits.
        extra: what a method adds: tiers of tokens, orders of channels, statistics.
    """

    packed: int
    full: int
    extra: int = 0

    @property
    def total(self) -> int:
        return self.packed + self.full + self.extra

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(self.packed + other.packed, self.full + other.full, self.extra + other.extra)

    def __mul__(self, count: int) -> CacheBytes:
        return CacheBytes(self.packed * count, self.full * count, self.extra * count)


def packed_tokens(context: int, bits: int, cache: CacheSettings) -> int:
    """Tokens that have left the window once a prompt of `context` tokens is in the cache and the window was applied.

    Under a token policy, `bits` are the more of a layer's keys and values, which are sorted together.
    """
    if cache.tokens is None and bits == FULL_PRECISION_BITS:
        return 0
    unit = cache.page if cache.tokens is None else cache.tokens.flush
    return cache.window.due(max(0, context - cache.sink), bits, unit)


def tensor_bytes(
    tensor: TensorPlan,
    kind: Kind,
    cache: CacheSettings,
    model: ModelInfo,
    context: int,
    batch: int = 1,
    element_bytes: int = 2,
    window_bits: int | None = None,
) -> CacheBytes:
    """Bytes of one layer's keys or values after a prompt of `context` tokens, and half of what it keeps for both.

    Args:
        window_bits: the width whose window holds, see `packed_tokens`; by default the tensor's own.
    """
    tokens = packed_tokens(context, tensor.bits if window_bits is None else window_bits, cache)
    counts = [tokens] if cache.tokens is None else cache.tokens.counts(tokens)[:-1]
    one = CacheBytes(0, (context - tokens) * model.head_dim * element_bytes)
    for form, count in zip(forms(tensor, kind, cache, model.head_dim), counts, strict=True):
        one += _form_bytes(form, count, cache, element_bytes)
    kept = _kept_bytes(cache, model, tokens, context)
    half = kept // 2 if kind == "value" else kept - kept // 2
    return (one * model.kv_heads + CacheBytes(0, 0, half)) * batch


def _form_bytes(form: Form, tokens: int, cache: CacheSettings, element_bytes: int) -> CacheBytes:
    """Bytes of one KV head's tokens of a form."""
    full = sum(tokens * part * element_bytes for part in form.runs if isinstance(part, int))
    packed = sum(tokens // part.page * part.nbytes for part in form.runs if isinstance(part, PageLayout))
    if cache.channels is None or not form.is_sorted:
        return CacheBytes(packed, full)
    width = sum(part if isinstance(part, int) else part.head_dim for part in form.runs)
    orders = -(-tokens // (cache.channels.refresh or max(1, tokens)))
    return CacheBytes(packed, full, orders * width * INDEX_BYTES)


def _kept_bytes(cache: CacheSettings, model: ModelInfo, tokens: int, context: int) -> int:
    """Bytes of what a layer keeps of one sequence, of which `tokens` are sorted: tiers and statistics."""
    of_channels = OVER_QUERIES if cache.channels is not None and cache.channels.weighs_queries else 0
    of_channels += 0 if cache.transforms is None else cache.transforms.kept
    kept = of_channels * model.kv_heads * model.head_dim * STATISTIC_BYTES
    if cache.tokens is None:
        return kept
    of_tokens = OVER_QUERIES * (cache.tokens.weighs_queries * model.kv_heads + cache.tokens.counts_queries)
    return (
        kept
        + tokens * model.kv_heads * INDEX_BYTES
        + max(0, context - cache.sink - tokens) * of_tokens * STATISTIC_BYTES
    )


def layer_bytes(
    layer: LayerPlan, cache: CacheSettings, model: ModelInfo, context: int, batch: int = 1, element_bytes: int = 2
) -> CacheBytes:
    """Bytes of one layer after a prompt of `context` tokens."""
    together = None if cache.tokens is None else max(layer.k.bits, layer.v.bits)
    sizes = (cache, model, context, batch, element_bytes, together)
    return tensor_bytes(layer.k, "key", *sizes) + tensor_bytes(layer.v, "value", *sizes)


def cache_bytes(plan: Plan, context: int, batch: int = 1, element_bytes: int = 2) -> CacheBytes:
    """Bytes of the planned layers after a prompt of `context` tokens.

    Args:
        element_bytes: size of an unquantized element, 2 for bfloat16 and float16, 4 for float32.
    """
    sizes = (plan.cache, plan.model, context, batch, element_bytes)
    return sum((layer_bytes(layer, *sizes) for layer in plan.layers.values()), CacheBytes(0, 0))


def full_precision_bytes(plan: Plan, context: int, batch: int = 1, element_bytes: int = 2) -> int:
    """Bytes of the planned layers, unquantized."""
    per_token = 2 * plan.model.kv_heads * plan.model.head_dim * element_bytes
    return batch * context * per_token * len(plan.layers)


def format_bytes(count: float) -> str:
    """`1.5 GiB`; three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.0f} TiB" if count >= 999.5 else f"{count:.3g} TiB"
