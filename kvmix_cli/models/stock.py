"""Contents of transformers' own cache, layer by layer, from a configuration alone. No torch.

What a layer keeps for each token follows from its heads and its kind; what it keeps once (a recurrent state, the last
inputs of a convolution) from the sizes of its family. Tests compare both with the tensors of models that have run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..errors import ModelError
from ..plan import HeadGeometry
from .geometry import layer_heads, layer_kinds, stock_layers

FLOAT32_BYTES = 4
SLIDING = {"sliding_attention": "sliding_window", "hybrid_sliding": "sliding_window"}
"""Kinds of layers that keep a window, and the setting that holds its tokens."""
CHUNKED = {"chunked_attention": "attention_chunk_size"}
WITH_STATE = ("hybrid", "hybrid_sliding", "linear_attention", "conv")
INDEXED = ("indexed_attention", "minimax_m3_sparse")
WITHOUT_ATTENTION = ("linear_attention", "conv", "dummy")


@dataclass(frozen=True)
class LayerState:
    """Elements that a layer keeps once for each sequence, however long it is.

    Attributes:
        elements: in the dtype of the model.
        float32: in 32 bits, whatever the model's dtype.
    """

    elements: int = 0
    float32: int = 0

    def nbytes(self, element_bytes: int) -> int:
        """Return the bytes of one sequence."""
        return self.elements * element_bytes + self.float32 * FLOAT32_BYTES


@dataclass(frozen=True)
class StockLayer:
    """Contents of one layer of transformers' own cache.

    Attributes:
        kind: full, latent, sliding, chunked, cross, linear or shared, or transformers' name of another kind.
        heads: KV heads; None for a layer that keeps no keys and values.
        is_planned: a plan decides about the keys and values.
        window: most tokens that are kept; None for all.
        side: elements that are kept for each token beside keys and values: those of an indexer.
        state: what is kept once for each sequence; None if the family's sizes are not known here.
        image_tokens: tokens that a layer keeps of each image, and none of the text.
    """

    kind: str
    heads: HeadGeometry | None = None
    is_planned: bool = False
    window: int | None = None
    side: int = 0
    state: LayerState | None = LayerState()
    image_tokens: int | None = None

    @property
    def keeps_more(self) -> bool:
        """Return whether it keeps anything beside keys and values."""
        return self.side > 0 or self.state != LayerState()

    def tokens(self, context: int, images: int = 0) -> int:
        """Return the tokens whose keys and values are kept at the end of a context."""
        if self.image_tokens is not None:
            return images * self.image_tokens
        return context if self.window is None else min(context, self.window)

    def side_bytes(self, context: int, batch: int, element_bytes: int) -> int:
        """Return the bytes beside keys and values."""
        state = 0 if self.state is None else self.state.nbytes(element_bytes)
        return batch * (context * self.side * element_bytes + state)

    def nbytes(self, context: int, batch: int, element_bytes: int, images: int = 0) -> int:
        """Return the bytes of everything that transformers' own cache keeps."""
        elements = 0 if self.heads is None else self.heads.token_elements * self.tokens(context, images)
        return batch * elements * element_bytes + self.side_bytes(context, batch, element_bytes)


def stock_cache(config: PreTrainedConfig, model_id: str) -> tuple[StockLayer, ...]:
    """Return the layers of transformers' own cache.

    Raises:
        ModelError: for sizes out of range.
        TorchNeeded: see `geometry.stock_layers`.
    """
    text = config.get_text_config(decoder=True)
    stock, state = stock_layers(config), _state(text)
    layers = list(zip(layer_kinds(text), text.per_layer_config, strict=True))
    try:
        return tuple(
            _layer(stock.get(index), kind, layer, _beside(kind, index, text, state), config)
            for index, (kind, layer) in enumerate(layers)
        )
    except ValueError as error:
        raise ModelError(
            f"{model_id} has a layer whose cache cannot be told from its configuration: {error}"
        ) from error


def _layer(stock: str | None, kind: str, layer: Any, beside: _Beside, config: PreTrainedConfig) -> StockLayer:
    """Return a layer by its kind in transformers.

    Args:
        stock: kind of a layer that no plan decides about; None for the others.
        layer: configuration of this layer.
    """
    if kind == "dummy":
        return StockLayer("shared")
    if kind in WITHOUT_ATTENTION:
        return StockLayer("linear", state=beside.state)
    kv_heads, key_dim, value_dim = layer_heads(layer)
    heads = HeadGeometry(kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
    if stock == "cross_attention":
        return StockLayer("cross", heads, image_tokens=_image_tokens(config))
    if (setting := (SLIDING | CHUNKED).get(kind)) is not None:
        window = max(0, getattr(layer, setting) - 1)  # the last token of a window is the query's own
        name = "chunked" if kind in CHUNKED else "sliding"
        return StockLayer(name, _sliding(layer, heads), window=window, state=beside.state)
    if stock is not None:
        return StockLayer(kind, heads, state=None)
    name = "latent" if getattr(layer, "kv_lora_rank", None) else "full"
    return StockLayer(name, heads, is_planned=True, side=beside.side, state=beside.state)


class _Beside(NamedTuple):
    side: int = 0
    state: LayerState | None = LayerState()


def _beside(kind: str, index: int, text: Any, state: LayerState | None) -> _Beside:
    """Return what a layer keeps beside keys and values; an unknown state for what is not known here."""
    if kind in WITH_STATE:
        return _Beside(state=state)
    if kind not in INDEXED:
        return _Beside()
    size, types = getattr(text, "index_head_dim", None), getattr(text, "indexer_types", None)
    if size is None or text.model_type.startswith("dots3"):  # Qwen4 compresses them, dots3 keeps them in float32
        return _Beside(state=None)
    return _Beside(0 if types is not None and types[index] == "shared" else size)


def _sliding(layer: Any, heads: HeadGeometry) -> HeadGeometry:
    """Return the heads of a layer with a window, which a few families make other than those of full attention."""
    if layer.model_type == "mimo_v2_flash":
        return heads.model_copy(update={"kv_heads": 2 * heads.kv_heads})
    kv_heads, dim = (getattr(layer, name, None) for name in ("swa_num_key_value_heads", "swa_head_dim"))
    if kv_heads is None or dim is None:
        return heads
    return HeadGeometry(kv_heads=kv_heads, key_dim=dim, value_dim=dim)  # Inkling


def _image_tokens(config: PreTrainedConfig) -> int:
    """Return the tokens of an image that Mllama attends to: all tiles that there can be, used or not."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return 0
    return int(vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1))


def _state(text: Any) -> LayerState | None:
    """Return what a recurrent layer of a family keeps of a sequence; None if its sizes are not known here.

    The last inputs of the convolution are in the dtype of the model. The recurrent state is in float32, as the PyTorch
    code of transformers keeps it; fused kernels of other packages may keep it smaller.
    """

    def size(*names: str) -> int:
        return next(int(value) for name in names if (value := getattr(text, name, None)) is not None)

    if getattr(text, "number_of_conv_states", 1) != 1:
        return None
    if hasattr(text, "conv_L_cache"):  # LFM2
        return LayerState(text.hidden_size * size("conv_L_cache"))
    if hasattr(text, "linear_num_key_heads"):  # gated delta rule: Qwen3-Next, Qwen3.5, OLMo-Hybrid
        keys, values = text.linear_key_head_dim, text.linear_num_value_heads * text.linear_value_head_dim
        channels = 2 * text.linear_num_key_heads * keys + values
        return LayerState(channels * size("linear_conv_kernel_dim"), keys * values)
    if hasattr(text, "linear_num_heads"):  # Kimi delta attention: Kimi-Linear, GLM-5, Ling
        channels = text.linear_num_heads * text.linear_head_dim
        return LayerState(3 * channels * size("linear_conv_kernel_dim"), channels * text.linear_head_dim)
    if not any(hasattr(text, name) for name in ("mamba_d_conv", "conv_kernel")):
        return None
    state, kernel = size("mamba_d_state", "ssm_state_size"), size("mamba_d_conv", "conv_kernel")
    if not any(hasattr(text, name) for name in ("mamba_n_groups", "mamba_ngroups", "n_groups")):  # Mamba: Jamba, Zamba
        channels = text.mamba_expand * text.hidden_size
        return LayerState(channels * kernel, channels * state)
    groups = size("mamba_n_groups", "mamba_ngroups", "n_groups")  # Mamba-2: Bamba, Falcon-H1, Nemotron-H, Zamba2
    heads = size("mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
    channels = heads * size("mamba_d_head", "mamba_head_dim", "mamba_headdim")
    return LayerState((channels + 2 * groups * state) * kernel, channels * state)
