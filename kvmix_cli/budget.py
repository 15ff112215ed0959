"""Bits and bytes, all from `kvmix_kernels.layout.PageLayout`. No torch.

Two counts, always shown together:

    nominal   bits of the codes alone, the papers' convention
    stored    bits of a packed page: codes, scales and zeros. What a context really takes also has its sinks, its
              window and the page that is filling up; `cache_bytes` counts those too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvmix_kernels.layout import FULL_PRECISION_BITS, Kind, PageLayout

if TYPE_CHECKING:
    from .plan import CacheSettings, LayerPlan, ModelInfo, Plan, TensorPlan

Count = Literal["nominal", "stored"]


def page_layout(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int) -> PageLayout | None:
    """The page layout of a layer's keys or values; None if they stay in full precision.

    Raises:
        ValueError: if the head cannot be packed (its size is no multiple of 16).
    """
    if tensor.bits == FULL_PRECISION_BITS:
        return None
    size = cache.group_size if tensor.group_size is None else tensor.group_size
    return PageLayout(
        kind=kind,
        bits=tensor.bits,
        head_dim=head_dim,
        page=cache.page,
        group_size=None if size == "row" else size,
        scale_dtype=cache.scale_dtype,
    )


def page_bytes(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int) -> int:
    """Bytes of one page of one KV head: packed, or in 16 bits if it is never packed."""
    layout = page_layout(tensor, kind, cache, head_dim)
    return cache.page * head_dim * FULL_PRECISION_BITS // 8 if layout is None else layout.nbytes


def tensor_bits(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int, count: Count) -> float:
    """Bits per element of a layer's keys or values."""
    if count == "nominal":
        return tensor.bits
    return 8 * page_bytes(tensor, kind, cache, head_dim) / (cache.page * head_dim)


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
    """What a cache takes, in bytes: packed pages, and what is in full precision (sinks and tail)."""

    packed: int
    full: int

    @property
    def total(self) -> int:
        return self.packed + self.full


def packed_tokens(context: int, bits: int, cache: CacheSettings) -> int:
    """Tokens that are packed once a prompt of `context` tokens is in the cache and its window has been applied."""
    if bits == FULL_PRECISION_BITS:
        return 0
    return cache.window.due(max(0, context - cache.sink), bits, cache.page)


def tensor_bytes(
    tensor: TensorPlan,
    kind: Kind,
    cache: CacheSettings,
    model: ModelInfo,
    context: int,
    batch: int = 1,
    element_bytes: int = 2,
) -> CacheBytes:
    """Bytes of one layer's keys or values after a prompt of `context` tokens."""
    layout = page_layout(tensor, kind, cache, model.head_dim)
    tokens = packed_tokens(context, tensor.bits, cache)
    heads = batch * model.kv_heads
    packed = 0 if layout is None else tokens // cache.page * layout.nbytes
    return CacheBytes(heads * packed, heads * (context - tokens) * model.head_dim * element_bytes)


def cache_bytes(plan: Plan, context: int, batch: int = 1, element_bytes: int = 2) -> CacheBytes:
    """Bytes of the planned layers after a prompt of `context` tokens.

    Args:
        element_bytes: size of an unquantized element, 2 for bfloat16 and float16, 4 for float32.
    """
    parts = [
        tensor_bytes(tensor, kind, plan.cache, plan.model, context, batch, element_bytes)
        for layer in plan.layers.values()
        for tensor, kind in layer.tensors
    ]
    return CacheBytes(sum(part.packed for part in parts), sum(part.full for part in parts))


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
