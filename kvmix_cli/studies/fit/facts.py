"""Everything about a model that its memory depends on, read without torch where that is possible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...plan import ModelInfo
from ...torchless import TorchNeeded, without_torch

if TYPE_CHECKING:
    from ...models.activations import ActivationSizes
    from ...models.stock import StockLayer
    from ...models.weight_bytes import WeightBytes

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelFacts:
    """Everything about a model that its memory depends on.

    Attributes:
        info: layers and heads.
        layers: contents of transformers' own cache, layer by layer.
        weights: bytes of the weights, and where the number is from.
        activations: sizes of what a forward takes beside.
        max_length: tokens that the model was made for; None if unbounded.
        dtype: of the configuration, `bfloat16`.
        needed_torch: what could not be read without torch, in words; None if everything could.
    """

    info: ModelInfo
    layers: tuple[StockLayer, ...]
    weights: WeightBytes
    activations: ActivationSizes
    max_length: int | None
    dtype: str
    needed_torch: str | None = None

    @property
    def element_bytes(self) -> int:
        """Return the bytes of a number in the configuration's dtype."""
        return ELEMENT_BYTES.get(self.dtype, 2)


def read_facts(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> ModelFacts:
    """Return the facts of a model, from its configuration and the headers of its files.

    Raises:
        ModelError: if there is no such model, or no plan can be made for it.
    """
    reason = "code that comes with the model" if trust_remote_code else None
    if not trust_remote_code:
        with without_torch():
            try:
                return _read(model, revision, trust_remote_code=False)
            except TorchNeeded as error:
                reason = str(error)
    return replace(_read(model, revision, trust_remote_code=trust_remote_code), needed_torch=reason)


def _read(model: str, revision: str | None, *, trust_remote_code: bool) -> ModelFacts:
    from ...models.activations import activation_sizes
    from ...models.configuration import find_config
    from ...models.geometry import max_length, model_info
    from ...models.stock import stock_cache
    from ...models.weight_bytes import find_weights

    checkpoint, config = find_config(model, revision, trust_remote_code)
    info = model_info(config, checkpoint.id, checkpoint.revision)
    layers = stock_cache(config, checkpoint.id)
    return ModelFacts(
        info=info,
        layers=layers,
        weights=find_weights(checkpoint, config),
        activations=activation_sizes(config, layers),
        max_length=max_length(config),
        dtype=str(config.dtype or "float32").removeprefix("torch."),
    )
