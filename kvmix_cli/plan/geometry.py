"""Model geometry: the layers and KV heads that a plan or profile is about."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pydantic import Field, field_validator, model_validator

from .document import Fault, Faults, StrictModel

MAX_LAYERS = 10_000


class ModelInfo(StrictModel):
    """Layers and KV heads of the model that a profile or plan belongs to.

    Attributes:
        id: hub id, local folder or `builtin:` name.
        layers: number of decoder layers.
        kv_heads: KV heads of a layer.
        head_dim: channels of a head.
        config_sha256: checksum of everything that shapes the model (see `models.geometry.fingerprint`).
        stock: layers that keep the transformers cache layer of their kind, in order, e.g. `{1: "sliding_attention"}`.
    """

    id: str
    revision: str | None = None
    layers: int = Field(ge=1, le=MAX_LAYERS)
    kv_heads: int = Field(ge=1, le=2**16)
    head_dim: int = Field(ge=1, le=2**16)
    config_sha256: str | None = None
    stock: dict[int, str] = Field(default_factory=dict)

    @field_validator("stock")
    @classmethod
    def _in_order(cls, stock: dict[int, str]) -> dict[int, str]:
        return dict(sorted(stock.items()))

    @model_validator(mode="after")
    def _has_these_layers(self) -> ModelInfo:
        beyond = [layer for layer in self.stock if not 0 <= layer < self.layers]
        if beyond:
            has = f"the model has layers 0-{self.layers - 1}"
            raise Faults((("stock", layer), f"layer {layer} cannot keep a stock cache: {has}") for layer in beyond)
        return self

    @property
    def quantizable(self) -> list[int]:
        """Return the indices of the layers whose keys and values a plan decides about."""
        return [layer for layer in range(self.layers) if layer not in self.stock]


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
