"""Layers, heads and checksum of a model, read from its configuration alone.

Attribute names differ between families; this is the only file that knows them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from contextlib import suppress
from typing import Any

from transformers import PreTrainedConfig

from .. import torchless
from ..errors import ModelError
from ..plan import HeadGeometry, ModelInfo
from ..plan.document.geometry import MAX_LAYERS
from ..plan.document.strict_yaml import reason

MAX_NUMBER = 2**53
"""More than any setting is, and the last whole number that a float holds as well."""
_SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads")
"""Settings that no model has without being at least 1."""
_OF_HEADS = ("head_dim", "v_head_dim", "kv_lora_rank")
"""Settings that are at least 1 where a model has them; beside `kv_lora_rank`, `head_dim` may be 0."""
_OF_FEED_FORWARD = (
    "intermediate_size",
    "moe_intermediate_size",
    "ffn_hidden_size",
    "expert_ffn_hidden_size",
    "ffn_dim",
)
"""Channels of feed-forward layers, at least 1 where a model has them; some models have a list, by layer."""
_COUNTS = ("_size", "_dim", "_rank", "_heads", "_experts")
"""Ends of the names of settings that are never negative."""
_SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_ROPE = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings")
_REAL = ("rope_theta", "factor")
"""Settings of rotary positions that are real numbers; transformers' own defaults write them as such."""
_LIMITS = ("max_position_embeddings", "max_seq_len", "seq_length")
APPENDING = frozenset({"full_attention", "indexed_attention", "hybrid", "minimax_m3_sparse"})
"""Kinds of layers whose stock cache appends keys and values, and does nothing else with them."""
OTHER_KINDS = frozenset(
    {
        "sliding_attention",
        "chunked_attention",
        "conv",
        "linear_attention",
        "hybrid_sliding",
        "dummy",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "reference_sliding_attention",
    }
)
"""All other kinds of transformers 5.23."""


def model_info(config: PreTrainedConfig, model_id: str = "", revision: str | None = None) -> ModelInfo:
    """Return the layers and heads of a model, as its cache holds them. Without an id it has the configuration's name.

    Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) caches one KV head: the latent as its key, the rotary
    part of the keys as its value. Both are stored as they are handed over, each at bits of its own. A width for the
    two together would give the rotary part, a tenth of the bytes, the bits that the latent needs.

    Raises:
        ModelError: if a size is out of range, or there is no layer whose keys and values could be quantized.
    """
    text = config.get_text_config(decoder=True)
    model_id = model_id or config.name_or_path or "this model"
    _require_sizes(text, model_id)
    _require_layers(text, model_id)
    _require_rope(getattr(text, "rope_parameters", None), model_id)
    stock = stock_layers(config)
    _require_attention(text, model_id, stock)
    return ModelInfo.of_heads(
        _heads_by_layer(text, model_id, stock),
        id=model_id,
        revision=revision,
        layers=text.num_hidden_layers,
        config_sha256=fingerprint(config),
        stock=stock,
    )


def stock_layers(config: PreTrainedConfig) -> dict[int, str]:
    """Return the layers that keep the stock cache of their kind, and the kind.

    Those are all whose stock cache does more with keys and values than to append them: it slides, compresses, or has
    none. What a stock cache keeps *beside* keys and values (an indexer's keys, a recurrent state) does not matter.
    Latent attention without a rotary part has no values, so that there is one tensor to decide about, not two.
    """
    text = config.get_text_config(decoder=True)
    kinds = layer_kinds(text)
    crossed = getattr(text, "cross_attention_layers", None) or ()  # Mllama: they cache an image, once
    found = {}
    for index, kind in enumerate(kinds):
        if index in crossed:
            found[index] = "cross_attention"
        elif not _appends(kind, text):
            found[index] = kind
        elif not _has_values(text, index):
            found[index] = "latent_only"
    return found


def _has_values(text: PreTrainedConfig, index: int) -> bool:
    """Return whether a layer caches values: a latent is a key, and only its rotary part a value."""
    layer = _layers(text)[index]
    if not getattr(layer, "kv_lora_rank", None):
        return True
    rotates = getattr(text, "no_rope_layers", None)  # Mistral Large 4: by layer
    return bool(layer.qk_rope_head_dim) and (rotates is None or bool(rotates[index]))


def layer_kinds(text: PreTrainedConfig) -> list[str]:
    """Return the kind of each layer's stock cache; `dummy` for layers that keep nothing, or share what others keep.

    Where torch is hidden, this is worked out as transformers 5.23 does.
    """
    if not torchless.is_hidden():
        from transformers.cache_utils import get_layer_types_and_kwargs

        return list(get_layer_types_and_kwargs(text)[0])
    kinds = getattr(text, "layer_types", None) or [_kind(layer) for layer in text.per_layer_config]
    modes = getattr(text, "kv_sharing_modes", None) or [None] * len(kinds)
    return [
        "dummy" if mode == "reuse" or kind in ("moe", "mlp") else kind for kind, mode in zip(kinds, modes, strict=False)
    ]


def _kind(layer: Any) -> str:
    if getattr(layer, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(layer, "attention_chunk_size", None) is None else "chunked_attention"


def _appends(kind: str, text: PreTrainedConfig) -> bool:
    """Return whether the stock cache of a kind of layer appends keys and values, and does nothing else with them.

    Raises:
        TorchNeeded: for a kind that only transformers knows, where torch is hidden.
    """
    if torchless.is_hidden():
        if kind not in APPENDING | OTHER_KINDS:
            raise torchless.TorchNeeded(f"layers of {kind}")
        return kind in APPENDING
    from transformers import MODEL_MAPPING
    from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer

    if kind not in DYNAMIC_LAYER_TYPE_MAPPING:
        with suppress(KeyError):
            MODEL_MAPPING[type(text)]  # loads the model's module, which registers the kinds that it brings along
    layer = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
    return layer is not None and issubclass(layer, DynamicLayer) and layer.update is DynamicLayer.update


def max_length(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that the model was made for; None where its configuration sets no limit."""
    text = config.get_text_config(decoder=True)
    limits = (getattr(text, name, None) for name in _LIMITS)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def fingerprint(config: PreTrainedConfig) -> str:
    """Return the SHA-256 of what shapes the model: sizes, heads, positions, layer kinds.

    It does not depend on dtype, generation settings, weight quantization, or what a release of transformers adds; nor
    on how a configuration writes a number: 10000 and 10000.0 are the same.
    """
    text = config.get_text_config(decoder=True)
    stock = stock_layers(config)
    shape: dict[str, Any] = {name: _number(_of_all(text, name), int) for name in _SHAPE}
    shape["heads"] = sorted({_shape_of(*layer_heads(layer)) for layer in _attention_layers(text, stock).values()})
    shape["rope"] = _rope(getattr(text, "rope_parameters", None))
    shape["stock"] = sorted(stock.items())
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def _of_all(text: PreTrainedConfig, name: str) -> Any:
    """Return a setting of all layers; where a configuration has it by layer only, its values in order."""
    try:
        return getattr(text, name, None)
    except RuntimeError:  # transformers refuses to read a setting that layers have of their own
        return sorted({getattr(layer, name, None) for layer in text.per_layer_config})


def _require_layers(text: PreTrainedConfig, model_id: str) -> None:
    layers = getattr(text, "num_hidden_layers", None)
    if layers is None:
        raise ModelError(
            f"{model_id} has not one stack of decoder layers ({text.model_type}), so kvmix cannot plan for it"
        )
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        raise ModelError(f"{model_id} has {layers} layers (num_hidden_layers); expected 1 to {MAX_LAYERS}")


def _require_attention(text: PreTrainedConfig, model_id: str, stock: dict[int, str]) -> None:
    layers = _attention_layers(text, stock).values()
    if not layers:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(stock.values()).most_common())
        raise ModelError(f"{model_id} has no full-attention layer, so nothing to quantize: its layers are {kinds}")
    if not all(getattr(layer, "num_attention_heads", None) for layer in layers):
        raise ModelError(f"{model_id} has no attention heads ({text.model_type}), so nothing to quantize")


def _require_sizes(text: PreTrainedConfig, model_id: str) -> None:
    """Raise ModelError for numbers of a damaged configuration that arithmetic with them would only trip over later."""
    sizes = {name: _of_all(text, name) for name in _SIZES}
    for name, setting in {**vars(text), **sizes}.items():
        least = _least(name, text)
        for value in setting if isinstance(setting, list) and least == 1 else [setting]:
            if not isinstance(value, int) or least <= value < MAX_NUMBER:
                continue
            shown = value if abs(value) < MAX_NUMBER else f"a number of {len(f'{abs(value):x}')} hexadecimal digits"
            raise ModelError(
                f"{model_id} has {shown} as its {name}; expected {least} to {MAX_NUMBER - 1}: correct its config.json"
            )


def _least(name: str, text: PreTrainedConfig) -> int:
    """Return the smallest number that a setting can have."""
    is_unused = name == "head_dim" and getattr(text, "kv_lora_rank", None)
    if name in (*_SIZES, *_OF_FEED_FORWARD) or (name in _OF_HEADS and not is_unused):
        return 1
    return 0 if name.endswith(_COUNTS) else -MAX_NUMBER


def _require_rope(parameters: Any, model_id: str) -> None:
    """Raise ModelError for rotary positions that are no positions: all of their numbers are finite and above 0."""
    if not isinstance(parameters, dict):
        return
    for name, value in parameters.items():
        if isinstance(value, dict):
            _require_rope(value, model_id)
        elif name in _ROPE and isinstance(value, int | float) and not 0 < value < math.inf:
            raise ModelError(
                f"{model_id} has {value} as its {name}; expected a number above 0: correct its config.json"
            )


def _heads_by_layer(text: PreTrainedConfig, model_id: str, stock: dict[int, str]) -> dict[int, HeadGeometry]:
    found = {}
    for index, layer in _attention_layers(text, stock).items():
        kv_heads, key_dim, value_dim = layer_heads(layer)
        try:
            found[index] = HeadGeometry(kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
        except ValueError as error:
            raise ModelError(
                f"{model_id} has {kv_heads} KV heads of {key_dim} channels (values of {value_dim}) in layer {index}: "
                f"{reason(error)}"
            ) from error
        if (heads := getattr(layer, "num_attention_heads", None)) and heads % kv_heads:
            raise ModelError(
                f"{model_id} has {heads} query heads and {kv_heads} KV heads in layer {index}: each KV head serves as "
                "many query heads; correct num_key_value_heads in its config.json"
            )
    return found


def _attention_layers(text: PreTrainedConfig, stock: dict[int, str]) -> dict[int, Any]:
    """Return a configuration for every layer without a stock cache; only few families (Gemma 4) make them differ."""
    return {index: layer for index, layer in enumerate(_layers(text)) if index not in stock}


def _layers(text: PreTrainedConfig) -> list[Any]:
    return list(getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers)


def layer_heads(layer: Any) -> tuple[int, int, int]:
    """Return the KV heads in one layer's cache, and the channels of their keys and of their values."""
    if rank := getattr(layer, "kv_lora_rank", None):
        return 1, rank, layer.qk_rope_head_dim
    heads = getattr(layer, "num_attention_heads", None) or 0
    head_dim = (
        getattr(layer, "head_dim", None)
        or getattr(layer, "dim_head", None)  # CPM-Ant
        or (layer.hidden_size // heads if heads else 0)
    )
    return _kv_heads(layer, heads), head_dim, getattr(layer, "v_head_dim", None) or head_dim


def _shape_of(kv_heads: int, key_dim: int, value_dim: int) -> tuple[int, ...]:
    """Return heads as the fingerprint has them; checksums of models with equal keys and values have two numbers."""
    return (kv_heads, key_dim) if value_dim == key_dim else (kv_heads, key_dim, value_dim)


def _kv_heads(layer: Any, heads: int) -> int:
    if layer.model_type == "falcon":
        # Falcon-40B computes `num_kv_heads` but repeats them before they reach the cache.
        return 1 if layer.multi_query and not layer.new_decoder_architecture else heads
    if layer.model_type == "gpt_bigcode":
        return 1 if layer.multi_query else heads
    if layer.model_type == "dbrx":
        return int(layer.attn_config.kv_n_heads)
    return getattr(layer, "num_key_value_heads", None) or heads


def _number(value: Any, form: type[int] | type[float]) -> Any:
    """Return a number in one form, if it has that form, so that equal numbers are written equally."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return form(value) if is_number and (form is float or value == math.trunc(value)) else value


def _rope(parameters: Any) -> Any:
    """Return the settings of rotary positions that have been stable, by layer type where they differ."""
    if not isinstance(parameters, dict):
        return None
    nested = {name: _rope(value) for name, value in parameters.items() if isinstance(value, dict)}
    return nested or {
        name: _number(parameters[name], float if name in _REAL else int)
        for name in _ROPE
        if parameters.get(name) is not None
    }
