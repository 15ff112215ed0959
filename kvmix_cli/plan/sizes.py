"""Bits and bytes of a cache, from `kvmix_kernels.layout.PageLayout` and the forms that a plan's settings imply.

Two counts, always shown together:

    nominal   bits of the codes alone, the papers' convention; an evicted token has none
    stored    bits of everything between sinks and window: codes, scales and zeros, tier maps, channel orders

Of a number of tokens to keep (`keep` of a token policy) both are of a kept token, since a share has no meaning there.

Functions of a layer take the plan's cache settings, those of a tensor the layer's own (`LayerPlan.settings`).

A real context also has its sinks, its window, the tokens that wait to be packed, and per-sequence statistics;
`layer_bytes` counts those too. Budgets and the cache read the same forms, so predicted and allocated bytes agree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvmix_kernels.layout import FULL_PRECISION_BITS, Kind
from kvmix_kernels.transform_layout import CHOICE_BYTES, TransformLayout, exact_count

from .codec import TransformTensor
from .document.geometry import HeadGeometry, ModelInfo
from .forms import INDEX_BYTES, BitCount, StorageForm, page_layout, storage_forms
from .layers import AnyTensor, LayerPlan, TensorPlan
from .merges import kept_numbers
from .reading import SelectiveReading
from .settings import CacheSettings

HEAD_BYTES = 2
"""The KV head of a page is int16, where heads keep different numbers of tokens."""
POSITION_BYTES = 4
"""Positions of the tokens that a budget keeps are int32."""
STATISTIC_BYTES = 4
"""Statistics of a token or a channel are float32."""
QUERY_SUMS = 2
"""A sum over queries has two parts: that of the last forward is apart, so that it can be taken back."""


def page_bytes(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int) -> int:
    """Return the bytes of one page of one KV head at the layer's own bits, in 16 bits if it is never packed."""
    layout = page_layout(tensor, kind, cache, head_dim)
    return cache.page * head_dim * FULL_PRECISION_BITS // 8 if layout is None else layout.nbytes


def transform_layout(tensor: TransformTensor, kind: Kind, cache: CacheSettings, head_dim: int) -> TransformLayout:
    """Return the page layout of a layer's keys or values in transform codes. Raises ValueError if they do not fit."""
    exact = 0 if cache.transform is None else cache.transform.exact
    return TransformLayout(kind, tensor.runs, head_dim, cache.page, exact)


def tensor_bits(tensor: AnyTensor, kind: Kind, cache: CacheSettings, head_dim: int, count: BitCount) -> float:
    """Return bits per element of a layer's keys or values, over all tokens that have left the window.

    Raises:
        ValueError: if the head, or a channel group, cannot be packed.
    """
    summary: float = 0
    if (reading := _summarizing(tensor, kind, cache)) is not None and count == "stored":
        summary = 8 * reading.page_bytes(cache.page, head_dim, FULL_PRECISION_BITS // 8) / (cache.page * head_dim)
    if isinstance(tensor, TransformTensor):
        layout = transform_layout(tensor, kind, cache, head_dim)
        return layout.nominal_bits if count == "nominal" else layout.stored_bits + summary
    forms = storage_forms(tensor, kind, cache, head_dim)
    bits = sum(float(form.share) * form.bits_per_element(cache, head_dim, count) for form in forms)
    if cache.tokens is None or count == "nominal":
        return bits + summary
    index: float = INDEX_BYTES if cache.kept is None else POSITION_BYTES
    if cache.tokens.sure is not None:
        index += float(cache.tokens.shares[-2]) * HEAD_BYTES / cache.page
    return bits + 8 * index / (2 * head_dim)


def _summarizing(tensor: AnyTensor, kind: Kind, cache: CacheSettings) -> SelectiveReading | None:
    """Return the choice of pages that a layer's keys have summaries for; None for those without."""
    return cache.reading if kind == "key" and tensor.window_bits != FULL_PRECISION_BITS else None


def parts_of(
    layer: LayerPlan, cache: CacheSettings, heads: HeadGeometry
) -> Iterator[tuple[LayerPlan, CacheSettings, HeadGeometry]]:
    """Yield the groups of a layer's heads: their storage, cache settings of their own, and the heads they are."""
    for group, part in layer.parts(heads.kv_heads):
        yield part, part.settings(cache), heads.model_copy(update={"kv_heads": len(group)})


def mean_bits(
    layers: Mapping[int, LayerPlan],
    cache: CacheSettings,
    model: ModelInfo,
    count: BitCount,
    kind: Kind | None = None,
) -> float:
    """Return mean bits per element over layers, of keys, of values, or (by default) of both.

    Layers that hold more elements a token count for more.
    """
    bits, elements = 0.0, 0
    for index, layer in layers.items():
        for part, settings, heads in parts_of(layer, cache, model.heads(index)):
            for tensor, of in part.tensors:
                if kind in (None, of):
                    bits += tensor_bits(tensor, of, settings, heads.dim(of), count) * heads.elements(of)
                    elements += heads.elements(of)
    return bits / elements if elements else 0.0


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache.

    Attributes:
        packed: codes, scales and zeros.
        full: everything in full precision: sinks, tail, tiers and channel groups of 16 bits.
        extra: additions of a policy: tier maps, channel orders, statistics, summaries of pages.
    """

    packed: int
    full: int
    extra: int = 0

    @property
    def total(self) -> int:
        """Return all bytes."""
        return self.packed + self.full + self.extra

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(self.packed + other.packed, self.full + other.full, self.extra + other.extra)

    def __mul__(self, count: int) -> CacheBytes:
        return CacheBytes(self.packed * count, self.full * count, self.extra * count)


def packed_tokens(context: int, bits: int, cache: CacheSettings) -> int:
    """Return the tokens that have left the window after a prompt of `context` tokens, once the window was applied.

    Under a token policy, `bits` is the larger width of a layer's keys and values, which are sorted together.
    """
    if cache.tokens is None and bits == FULL_PRECISION_BITS:
        return 0
    unit = cache.page if cache.tokens is None else cache.tokens.flush
    return cache.window.due(max(0, context - cache.sink), bits, unit)


def held_tokens(tokens: int, cache: CacheSettings) -> tuple[int, ...]:
    """Return how many of the `tokens` that have left the window are held in each tier, the layer's own bits last."""
    if cache.tokens is None:
        return (tokens,)
    return cache.tokens.counts(tokens)[:-1] if cache.kept is None else (min(tokens, cache.kept),)


def fullest_contexts(layer: LayerPlan, cache: CacheSettings, context: int) -> set[int]:
    """Return the last contexts before a layer packed its latest tokens: with them in 16 bits, it takes more bytes."""
    if layer.head_groups:
        most = 1 + max(head for group in layer.head_groups for head in group.heads)
        return set().union(*(fullest_contexts(part, cache, context) for _, part in layer.parts(most + 1)))
    found, cache = set(), layer.settings(cache)
    for bits in window_widths(layer, cache):
        packed = packed_tokens(context, bits, cache)
        if packed:
            first = bisect_left(range(context + 1), packed, key=lambda tokens: packed_tokens(tokens, bits, cache))
            found.add(first - 1)
    return found


def tensor_bytes(
    tensor: AnyTensor,
    kind: Kind,
    cache: CacheSettings,
    heads: HeadGeometry,
    context: int,
    batch: int = 1,
    element_bytes: int = 2,
    window_bits: int | None = None,
    unit: int | None = None,
) -> CacheBytes:
    """Return the bytes of one layer's keys or values after a prompt, with half of what the layer keeps for both.

    Args:
        heads: KV heads of the layer.
        context: tokens of the prompt.
        batch: number of sequences.
        element_bytes: size of an unquantized element, 2 for bfloat16 and float16, 4 for float32.
        window_bits: the width whose window applies, see `packed_tokens`; by default the tensor's own.
        unit: tokens that a budget of tokens keeps or drops together, see `budget_unit`; by default the tensor's own.
    """
    tokens = packed_tokens(context, tensor.window_bits if window_bits is None else window_bits, cache)
    summaries = 0
    if (reading := _summarizing(tensor, kind, cache)) is not None and tokens:
        sizes = heads.dim(kind), element_bytes
        summaries = tokens // cache.page * reading.page_bytes(cache.page, *sizes) + reading.book_bytes(*sizes)
        summaries *= heads.kv_heads
    if isinstance(tensor, TransformTensor):
        pages, layout = tokens // cache.page, transform_layout(tensor, kind, cache, heads.dim(kind))
        full = context - tokens + exact_count(layout.exact, pages, cache.page)
        return CacheBytes(pages * layout.packed_bytes, full * heads.elements(kind) * element_bytes, summaries) * batch
    one = CacheBytes(0, (context - tokens) * heads.dim(kind) * element_bytes)
    forms = storage_forms(tensor, kind, cache, heads.dim(kind))
    for form, count in zip(forms, held_tokens(tokens, cache), strict=True):
        one += _form_bytes(form, count, cache, element_bytes)
    unit = (1 if tensor.bits == FULL_PRECISION_BITS else cache.page) if unit is None else unit
    kept = _policy_bytes(cache, heads, tokens, context, unit)
    half = kept // 2 if kind == "value" else kept - kept // 2
    return (one * heads.kv_heads + CacheBytes(0, 0, half + summaries)) * batch


def _form_bytes(form: StorageForm, tokens: int, cache: CacheSettings, element_bytes: int) -> CacheBytes:
    """Return the bytes of one KV head's tokens of a form."""
    full = sum(tokens * group * element_bytes for group in form.groups if isinstance(group, int))
    packed = sum(tokens // group.page * group.nbytes for group in form.groups if not isinstance(group, int))
    if cache.channels is None or not form.is_sorted:
        return CacheBytes(packed, full)
    width = sum(group if isinstance(group, int) else group.head_dim for group in form.groups)
    orders = -(-tokens // (cache.channels.refresh or max(1, tokens)))
    return CacheBytes(packed, full, orders * width * INDEX_BYTES)


def budget_unit(layer: LayerPlan, cache: CacheSettings) -> int:
    """Return the tokens that a budget keeps or drops together: one where nothing is packed, else a page."""
    return 1 if layer.k.window_bits == layer.v.window_bits == FULL_PRECISION_BITS else cache.page


def _policy_bytes(cache: CacheSettings, heads: HeadGeometry, tokens: int, context: int, unit: int) -> int:
    """Return the bytes of tier maps, positions and statistics of one sequence, of which `tokens` are sorted."""
    of_keys = QUERY_SUMS if cache.channels is not None and cache.channels.weighs_queries else 0
    of_values = 0
    if cache.transforms is not None:
        of_keys += cache.transforms.kept("key")
        of_values = cache.transforms.kept("value")
    kept = (of_keys * heads.elements("key") + of_values * heads.elements("value")) * STATISTIC_BYTES
    if cache.tokens is None:
        return kept
    index, statistics = tokens * INDEX_BYTES, cache.tokens.statistics
    if cache.tokens.sure is not None:
        index += held_tokens(tokens, cache)[-1] // cache.page * HEAD_BYTES
    if cache.kept is not None:
        held, numbers = min(tokens, cache.kept), statistics.of_unit(cache.tokens.when == "always", context)
        index = held * POSITION_BYTES + held // unit * numbers * STATISTIC_BYTES
    waiting = max(0, context - cache.sink - tokens) * statistics.numbers(heads.kv_heads, context)
    labels = 0 if cache.tokens.images is None else context - (cache.sink + tokens if tokens else 0)
    once = statistics.queries * heads.elements("key") + kept_numbers(cache.tokens.merge, heads.kv_heads)
    return kept + index * heads.kv_heads + (waiting + once) * STATISTIC_BYTES + labels


def exact_tokens(layer: LayerPlan, cache: CacheSettings) -> int:
    """Return the tokens of each page and KV head that a layer of transform codes keeps exact; 0 for other layers."""
    return cache.transform.exact if layer.is_coded and cache.transform is not None else 0


def window_widths(layer: LayerPlan, cache: CacheSettings) -> tuple[int, int]:
    """Return the widths whose windows apply to a layer's keys and to its values.

    Keys and values that are sorted together, or that share exact tokens, leave the window together.
    """
    widths = layer.k.window_bits, layer.v.window_bits
    if cache.tokens is not None:
        return max(widths), max(widths)
    if exact_tokens(layer, cache):
        together = max(bits for bits in widths if bits != FULL_PRECISION_BITS)
        keys, values = (bits if bits == FULL_PRECISION_BITS else together for bits in widths)
        return keys, values
    return widths


def layer_bytes(
    layer: LayerPlan, cache: CacheSettings, heads: HeadGeometry, context: int, batch: int = 1, element_bytes: int = 2
) -> CacheBytes:
    """Return the bytes of one layer with these KV heads after a prompt of `context` tokens."""
    if layer.head_groups:
        parts = ((part, geometry) for part, _, geometry in parts_of(layer, cache, heads))
        found = (layer_bytes(part, cache, geometry, context, batch, element_bytes) for part, geometry in parts)
        return sum(found, CacheBytes(0, 0))
    total, cache = CacheBytes(0, 0), layer.settings(cache)
    unit = budget_unit(layer, cache)
    for (tensor, kind), bits in zip(layer.tensors, window_widths(layer, cache), strict=True):
        total += tensor_bytes(tensor, kind, cache, heads, context, batch, element_bytes, bits, unit)
    if exact := exact_tokens(layer, cache):
        total += _choice_bytes(layer, cache, heads, context, exact) * batch
    return total


def _choice_bytes(layer: LayerPlan, cache: CacheSettings, heads: HeadGeometry, context: int, exact: int) -> CacheBytes:
    """Return what a layer keeps to choose exact tokens by: of those that are, and of tokens that wait to be packed."""
    tokens = max(packed_tokens(context, bits, cache) for bits in window_widths(layer, cache))
    waiting = max(0, context - cache.sink - tokens)
    of_exact = exact_count(exact, tokens // cache.page, cache.page) * CHOICE_BYTES
    return CacheBytes(0, 0, heads.kv_heads * (of_exact + QUERY_SUMS * waiting * STATISTIC_BYTES))


def format_bytes(count: float) -> str:
    """Return bytes as text with three significant digits, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.0f} TiB" if count >= 999.5 else f"{count:.3g} TiB"
