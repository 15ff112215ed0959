"""Forms in which a layer's keys or values are stored: tiers of tokens, and groups of channels in each.

Budgets and the cache read the same forms, so predicted and allocated bytes agree (`sizes.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from kvmix_kernels.layout import FULL_PRECISION_BITS, WORD_BITS, Encoder, Kind, PageLayout

from ..codecs import CODECS, PageCodec
from .layers import TensorPlan
from .settings import CacheSettings

BitCount = Literal["nominal", "stored"]
ChannelStorage = PageLayout | PageCodec | int
"""A channel group: packed pages, pages of a codec, or a number of channels in full precision."""
INDEX_BYTES = 1
"""A token's tier and a channel's place are uint8."""
ANY_HEAD = "transform codes take heads of any size (profile --score fisher-metric)"
"""The way to a plan where heads do not fit into pages."""


@dataclass(frozen=True)
class StorageForm:
    """Storage of a share of the tokens between sinks and window.

    Attributes:
        share: share of those tokens.
        groups: channel groups in order; one, except for keys that a channel policy sorts.
        encoder: how their scales and zeros are chosen.
    """

    share: Fraction
    groups: tuple[ChannelStorage, ...]
    encoder: Encoder = "minmax"

    @property
    def is_sorted(self) -> bool:
        """Return whether its channels have an order of their own, which has to be stored."""
        return len(self.groups) > 1 and not self.is_full

    @property
    def is_full(self) -> bool:
        """Return whether nothing of it is quantized."""
        return all(isinstance(group, int) for group in self.groups)

    def bits_per_element(self, cache: CacheSettings, head_dim: int, count: BitCount) -> float:
        """Return nominal or stored bits per element of a head of `head_dim` channels."""
        total = 0.0
        for group in self.groups:
            if isinstance(group, int):
                total += FULL_PRECISION_BITS * group
            else:
                total += (group.bits if count == "nominal" else group.stored_bits) * group.head_dim
        refresh = cache.channels.refresh if cache.channels and self.is_sorted and count == "stored" else 0
        return total / head_dim + (8 * INDEX_BYTES / refresh if refresh else 0)


def storage_forms(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int) -> tuple[StorageForm, ...]:
    """Return the forms of a layer's keys or values: one for each tier, then that of the layer's own bits.

    Raises:
        ValueError: if the head, or a channel group, is no multiple of 16 channels.
    """
    encoder = tensor.encode or cache.encoder(kind)
    if cache.tokens is None:
        return (StorageForm(Fraction(1), _channel_groups(tensor, kind, cache, head_dim), encoder),)
    widths = [tier.k if kind == "key" else tier.v for tier in cache.tokens.tiers]
    tensors = [tensor.model_copy(update={"bits": max(bits, tensor.bits)}) for bits in widths]
    shares = cache.tokens.shares[:-1]
    return tuple(
        StorageForm(share, _channel_groups(each, kind, cache, head_dim), encoder)
        for share, each in zip(shares, (*tensors, tensor), strict=True)
    )


def _channel_groups(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int) -> tuple[ChannelStorage, ...]:
    if kind == "value" or cache.channels is None:
        return (_channel_storage(tensor, kind, cache, head_dim),)
    bits = [max(group.bits, tensor.bits) for group in cache.channels.runs]
    widths = cache.channels.widths(head_dim)
    tensors = [tensor.model_copy(update={"bits": each}) for each in (*bits, tensor.bits)]
    return tuple(_channel_storage(each, kind, cache, width) for each, width in zip(tensors, widths, strict=True))


def _channel_storage(tensor: TensorPlan, kind: Kind, cache: CacheSettings, channels: int) -> ChannelStorage:
    if tensor.bits == FULL_PRECISION_BITS:
        return channels
    layout = _affine_layout(tensor, kind, cache, channels)
    name = None if cache.codecs is None else cache.codecs.of(kind)
    if name is None:
        return layout
    codec = CODECS[name].learned() if cache.codecs and cache.codecs.codebooks else CODECS[name]
    return codec(kind, layout.bits, channels, layout.page, layout.group_size, layout.scale_dtype)


def _affine_layout(tensor: TensorPlan, kind: Kind, cache: CacheSettings, channels: int) -> PageLayout:
    if channels < WORD_BITS or channels % WORD_BITS:
        raise ValueError(f"head_dim must be a positive multiple of {WORD_BITS}, got {channels}: {ANY_HEAD}")
    size = cache.group_size if tensor.group_size is None else tensor.group_size
    return PageLayout(
        kind=kind,
        bits=tensor.bits,
        head_dim=channels,
        page=cache.page,
        group_size=None if size == "row" else size,
        scale_dtype=cache.scale_dtype,
    )


def page_layout(tensor: TensorPlan, kind: Kind, cache: CacheSettings, head_dim: int) -> PageLayout | None:
    """Return the layout of affine pages of a layer's keys or values at its own bits; None for full precision.

    Raises:
        ValueError: if the head size is no multiple of 16.
    """
    return None if tensor.bits == FULL_PRECISION_BITS else _affine_layout(tensor, kind, cache, head_dim)
