"""Widths of each layer's keys and values, and their short form `"0-3:k4v4,4-31:k2v2"`."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Annotated, Any

from kvmix_kernels.layout import Encoder, Kind
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
)

from .codec import CODED, TransformTensor, codec_of
from .document.fields import as_tuple, known_width
from .document.geometry import MAX_HEADS, format_ranges
from .document.strict_yaml import StrictModel
from .settings import CacheSettings, GroupSize
from .tokens import TokenShares

_WIDTH = rf"(\d{{1,2}}|{CODED}\d(?:\.\d{{1,3}})?)"
_PART = re.compile(rf"\s*(\d{{1,5}})(?:-(\d{{1,5}}))?:k{_WIDTH}v{_WIDTH}\s*", re.ASCII)


class TensorPlan(StrictModel):
    """Storage of one layer's keys, or values, in groups with a scale and a zero, or in full precision.

    Attributes:
        bits: width of a code; 16 keeps full precision.
        group_size: elements that share a scale and a zero; None for the cache's own.
        encode: how scales and zeros are chosen; None for the cache's own.
    """

    bits: int
    group_size: GroupSize | None = None
    encode: Encoder | None = None

    _known = field_validator("bits")(known_width)

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return what files state; without an encoder, a plan has the checksum that it had before there were any."""
        return {name: value for name, value in write(self).items() if name != "encode" or value is not None}

    @property
    def mean_width(self) -> float:
        """Return the bits of a code."""
        return self.bits

    @property
    def window_bits(self) -> int:
        """Return the width whose window applies: its own."""
        return self.bits

    @property
    def own(self) -> list[str]:
        """Return the group size and the encoder as text, as far as they are not the cache's."""
        return [f"{each}" for each in (self.group_size, self.encode) if each is not None]

    @property
    def short(self) -> str:
        """Return the width as text, `4`."""
        return f"{self.bits}"


AnyTensor = Annotated[
    Annotated[TensorPlan, Tag("affine")] | Annotated[TransformTensor, Tag("transform")], Discriminator(codec_of)
]
"""Storage of one layer's keys, or values, in any codec."""


class HeadGroup(StrictModel):
    """Some KV heads of a layer, and what they have of their own.

    Attributes:
        heads: the KV heads, ascending.
        k, v: storage of their keys, and of their values; None for the layer's.
        tokens: what they have of their own in the token policy; None for what the layer has.
    """

    heads: Annotated[tuple[Annotated[int, Field(ge=0, lt=MAX_HEADS)], ...], BeforeValidator(as_tuple)]
    k: TensorPlan | None = None
    v: TensorPlan | None = None
    tokens: TokenShares | None = None

    @field_validator("heads")
    @classmethod
    def _ascending(cls, heads: tuple[int, ...]) -> tuple[int, ...]:
        if not heads or list(heads) != sorted(set(heads)):
            raise ValueError(f"must be KV heads in ascending order, at least one, got {list(heads)}")
        return heads

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return what files state: what the group has of its own."""
        return {name: value for name, value in write(self).items() if value is not None}


class LayerPlan(StrictModel):
    """Storage of one layer's keys and values.

    Attributes:
        k, v: storage of keys, and of values.
        tokens: what this layer has of its own in the token policy of the cache; None for the policy as it is.
        head_groups: KV heads that are stored otherwise than the others of the layer.
    """

    k: AnyTensor
    v: AnyTensor
    tokens: TokenShares | None = None
    head_groups: Annotated[tuple[HeadGroup, ...], BeforeValidator(as_tuple)] = ()

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return what files state; without tokens and groups of its own, a layer is what it was before they existed."""
        unused = {name for name in ("tokens", "head_groups") if not getattr(self, name)}
        return {name: value for name, value in write(self).items() if name not in unused}

    def parts(self, kv_heads: int) -> list[tuple[tuple[int, ...], LayerPlan]]:
        """Return the groups of a layer's `kv_heads` heads, each with its storage as that of a layer.

        Heads that no group has are the first part.
        """
        if not self.head_groups:
            return [(tuple(range(kv_heads)), self)]
        grouped = {head for group in self.head_groups for head in group.heads}
        rest = tuple(head for head in range(kv_heads) if head not in grouped)
        own = [(rest, LayerPlan(k=self.k, v=self.v, tokens=self.tokens))] if rest else []
        return own + [
            (group.heads, LayerPlan(k=group.k or self.k, v=group.v or self.v, tokens=group.tokens or self.tokens))
            for group in self.head_groups
        ]

    def head_faults(self, kv_heads: int) -> Iterator[str]:
        """Yield why the head groups are not some of a layer's `kv_heads` heads, each in one group at most."""
        heads = [head for group in self.head_groups for head in group.heads]
        if self.head_groups and self.is_coded:
            yield "transform codes have widths of each KV head, and no groups of heads"
        if wrong := [head for head in heads if head >= kv_heads]:
            yield f"the layer has KV heads 0-{kv_heads - 1}, and no head {wrong[0]}"
        if twice := [head for head in set(heads) if heads.count(head) > 1]:
            yield f"KV head {twice[0]} is in two groups"

    @classmethod
    def of_bits(cls, k_bits: int, v_bits: int) -> LayerPlan:
        """Return a layer with these widths and the cache's group size. Raises ValueError for an unknown width."""
        return cls(k=TensorPlan(bits=k_bits), v=TensorPlan(bits=v_bits))

    @property
    def tensors(self) -> tuple[tuple[AnyTensor, Kind], tuple[AnyTensor, Kind]]:
        """Return keys and values, each with its kind."""
        return (self.k, "key"), (self.v, "value")

    @property
    def affine(self) -> tuple[tuple[TensorPlan, Kind], tuple[TensorPlan, Kind]]:
        """Return keys and values, each with its kind, of a layer without transform codes."""
        if not isinstance(self.k, TensorPlan) or not isinstance(self.v, TensorPlan):
            raise AssertionError(f"{self.short} has transform codes, which have no bits of a whole tensor")
        return (self.k, "key"), (self.v, "value")

    @property
    def is_coded(self) -> bool:
        """Return whether keys or values are stored as transform codes."""
        return isinstance(self.k, TransformTensor) or isinstance(self.v, TransformTensor)

    def settings(self, cache: CacheSettings) -> CacheSettings:
        """Return a plan's cache settings with what this layer has of its own.

        Raises:
            ValueError: if what the layer has of its own does not fit the token policy, or there is none.
        """
        if self.tokens is None:
            return cache
        if cache.tokens is None:
            raise ValueError("there is no token policy, cache.tokens, that a layer could change")
        return cache.model_copy(update={"tokens": cache.tokens.of_layer(self.tokens)})

    @property
    def short(self) -> str:
        """Return the widths as text, `k4v2`; of transform codes their mean, `kt2.25vt1.75`."""
        return f"k{self.k.short}v{self.v.short}"


LayerSpan = tuple[int, int, LayerPlan]
"""First and last index of neighbouring layers that are stored alike, and how."""


def spans_of(layers: Mapping[int, LayerPlan]) -> list[LayerSpan]:
    """Return spans of neighbouring layers that are stored alike, in ascending order."""
    spans: list[LayerSpan] = []
    for index, layer in sorted(layers.items()):
        if spans and spans[-1][1:] == (index - 1, layer):
            spans[-1] = (spans[-1][0], index, layer)
        else:
            spans.append((index, index, layer))
    return spans


def format_short(layers: Mapping[int, LayerPlan]) -> str:
    """Return the short form of layers: their widths, without group sizes, tokens and heads of their own."""
    widths = {index: layer.model_copy(update={"tokens": None, "head_groups": ()}) for index, layer in layers.items()}
    return ",".join(
        f"{first}:{layer.short}" if first == last else f"{first}-{last}:{layer.short}"
        for first, last, layer in spans_of(widths)
    )


def parse_short(text: str, stock: Iterable[int] = ()) -> dict[int, LayerPlan]:
    """Return the layers of a short form, those with a stock cache left out.

    Args:
        stock: layers that keep a stock cache; the text may name them.

    Raises:
        ValueError: if the text is malformed, has an unknown width, or names a layer twice.
    """
    layers: dict[int, LayerPlan] = {}
    for indices, k, v in _parts(text, layers):
        if CODED in k + v:
            raise ValueError(
                f"'k{k}v{v}' is the mean width of transform codes, which make no plan: give the plan's file"
            )
        layers.update(dict.fromkeys(indices, LayerPlan.of_bits(int(k), int(v))))
    kept = set(stock)
    return {index: layer for index, layer in layers.items() if index not in kept}


def parse_mean_widths(text: str) -> dict[int, tuple[float, float]]:
    """Return the mean widths of each layer's keys and values in a short form, which transform codes have, too.

    Raises:
        ValueError: if the text is malformed, or names a layer twice.
    """
    widths: dict[int, tuple[float, float]] = {}
    for indices, k, v in _parts(text, widths):
        widths.update(dict.fromkeys(indices, (float(k.lstrip(CODED)), float(v.lstrip(CODED)))))
    return widths


def _parts(text: str, found: Container[int]) -> Iterator[tuple[range, str, str]]:
    """Yield the layers of each part of a short form, and the widths of their keys and values, as they are written."""
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if not match:
            raise ValueError(f"'{part.strip()}' is not of the form FIRST-LAST:kBITSvBITS")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"'{part.strip()}' ends before it begins")
        if twice := [index for index in range(first, last + 1) if index in found]:
            raise ValueError(f"layer {format_ranges(twice)} is given twice")
        yield range(first, last + 1), match[3], match[4]
