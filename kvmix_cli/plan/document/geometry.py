"""Model geometry: the layers and KV heads that a plan or profile is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from kvmix_kernels.layout import Kind
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from .strict_yaml import Fault, Faults, StrictModel

MAX_LAYERS = 10_000
"""More than any model has, and few enough that a damaged file cannot ask for endless work."""
MAX_HEADS = MAX_DIM = 2**16


class HeadGeometry(StrictModel):
    """The KV heads of one layer, as its cache holds them.

    Attributes:
        kv_heads: number of KV heads.
        key_dim: channels of a head's keys.
        value_dim: channels of a head's values.
    """

    kv_heads: int = Field(ge=1, le=MAX_HEADS)
    key_dim: int = Field(ge=1, le=MAX_DIM)
    value_dim: int = Field(ge=1, le=MAX_DIM)

    def dim(self, kind: Kind) -> int:
        """Return the channels of a head's keys, or values."""
        return self.key_dim if kind == "key" else self.value_dim

    def elements(self, kind: Kind) -> int:
        """Return the elements of one token's keys, or values, in all KV heads."""
        return self.kv_heads * self.dim(kind)

    @property
    def token_elements(self) -> int:
        """Return the elements of one token's keys and values."""
        return self.elements("key") + self.elements("value")

    def __str__(self) -> str:
        values = "" if self.value_dim == self.key_dim else f" (values {self.value_dim})"
        return f"{self.kv_heads} x {self.key_dim}{values}"


class ModelInfo(StrictModel):
    """Layers and KV heads of the model that a profile or plan belongs to.

    `kv_heads`, `head_dim` and `value_dim` hold for every layer that `other_heads` does not have. Readers ask
    `heads(layer)`. Files of models whose layers are all alike state `kv_heads` and `head_dim` only.

    Attributes:
        id: hub id, local folder or `builtin:` name.
        layers: number of decoder layers.
        kv_heads: KV heads of a layer.
        head_dim: channels of a head's keys.
        value_dim: channels of a head's values; None where they are `head_dim`.
        other_heads: layers with other KV heads, in order.
        config_sha256: checksum of everything that shapes the model (see `models.geometry.fingerprint`).
        stock: layers that keep the transformers cache layer of their kind, in order, e.g. `{1: "sliding_attention"}`.
    """

    id: str = Field(min_length=1)
    revision: str | None = None
    layers: int = Field(ge=1, le=MAX_LAYERS)
    kv_heads: int = Field(ge=1, le=MAX_HEADS)
    head_dim: int = Field(ge=1, le=MAX_DIM)
    value_dim: int | None = Field(default=None, ge=1, le=MAX_DIM)
    other_heads: dict[int, HeadGeometry] = Field(default_factory=dict)
    config_sha256: str | None = None
    stock: dict[int, str] = Field(default_factory=dict)

    @classmethod
    def of_heads(cls, heads: Mapping[int, HeadGeometry], **facts: Any) -> ModelInfo:
        """Return the geometry of a model from the KV heads of each of its layers without a stock cache.

        Args:
            heads: at least one layer. The most frequent KV heads become the model's own; of equally frequent ones
                those of the earlier layer.
            facts: the other attributes.
        """
        common, _ = Counter(heads[layer] for layer in sorted(heads)).most_common(1)[0]
        others = {layer: each for layer, each in heads.items() if each != common}
        return cls(
            kv_heads=common.kv_heads,
            head_dim=common.key_dim,
            value_dim=common.value_dim,
            other_heads=others,
            **facts,
        )

    @field_validator("stock")
    @classmethod
    def _in_order(cls, stock: dict[int, str]) -> dict[int, str]:
        return dict(sorted(stock.items()))

    @field_validator("value_dim")
    @classmethod
    def _stated_once(cls, value_dim: int | None, info: ValidationInfo) -> int | None:
        return None if value_dim == info.data.get("head_dim") else value_dim

    @field_validator("other_heads")
    @classmethod
    def _only_others(cls, heads: dict[int, HeadGeometry], info: ValidationInfo) -> dict[int, HeadGeometry]:
        known = info.data
        own = (known.get("kv_heads"), known.get("head_dim"), known.get("value_dim") or known.get("head_dim"))
        others = sorted(heads.items())
        return {layer: each for layer, each in others if (each.kv_heads, each.key_dim, each.value_dim) != own}

    @model_validator(mode="after")
    def _has_these_layers(self) -> ModelInfo:
        has = f"the model has layers 0-{self.layers - 1}"
        faults: list[Fault] = [
            (("stock", layer), f"layer {layer} cannot keep a stock cache: {has}")
            for layer in self.stock
            if not 0 <= layer < self.layers
        ]
        for layer in self.other_heads:
            if layer in self.stock:
                why = f"it keeps its {self.stock[layer]} cache"
            elif not 0 <= layer < self.layers:
                why = has
            else:
                continue
            faults.append((("other_heads", layer), f"layer {layer} cannot have heads to plan for: {why}"))
        if faults:
            raise Faults(faults)
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return what files and checksums state: what layers that are all alike do not need is left out."""
        data: dict[str, Any] = write(self)
        for name in ("value_dim", "other_heads"):
            if not getattr(self, name):
                data.pop(name, None)
        return data

    @property
    def quantizable(self) -> list[int]:
        """Return the indices of the layers whose keys and values a plan decides about."""
        return [layer for layer in range(self.layers) if layer not in self.stock]

    @property
    def stock_counts(self) -> dict[str, int]:
        """Return the number of layers that keep the stock cache of each kind, e.g. `{"sliding_attention": 4}`."""
        return dict(Counter(self.stock.values()))

    def heads(self, layer: int) -> HeadGeometry:
        """Return the KV heads of a layer without a stock cache."""
        other = self.other_heads.get(layer)
        return other or HeadGeometry(
            kv_heads=self.kv_heads, key_dim=self.head_dim, value_dim=self.value_dim or self.head_dim
        )

    @property
    def geometries(self) -> dict[HeadGeometry, list[int]]:
        """Return the layers without a stock cache by their KV heads, each kind in the order of its first layer."""
        found: dict[HeadGeometry, list[int]] = {}
        for layer in self.quantizable:
            found.setdefault(self.heads(layer), []).append(layer)
        return found


def coverage_faults(model: ModelInfo, layers: Collection[int]) -> Iterator[Fault]:
    """Yield a fault for each layer that is missing, or that a plan or profile of this model cannot have."""
    expected = set(model.quantizable)
    if missing := sorted(expected - set(layers)):
        yield (), f"no entry for layer {format_ranges(missing)}"
    for layer in sorted(set(layers) - expected):
        kind = model.stock.get(layer)
        keeps = f"it keeps its {kind} cache" if kind else f"the model has layers 0-{model.layers - 1}"
        yield (layer,), f"layer {layer} cannot be planned: {keeps}"


def format_ranges(indices: list[int]) -> str:
    """Return ascending indices as text: `[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
