"""What a cache needs to know of a model, read from its configuration alone.

Attribute names differ between families; this is the only file that knows them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from ..errors import ModelError
from ..plan import ModelInfo

_SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_ROPE = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings")
_QUANTIZABLE = "full_attention"
_LIMITS = ("max_position_embeddings", "max_seq_len", "seq_length")


def model_info(config: PreTrainedConfig, model_id: str, revision: str | None = None) -> ModelInfo:
    """Layers and heads of a model, as its cache holds them.

    Raises:
        ModelError: if there is no layer whose keys and values could be quantized.
    """
    text = config.get_text_config(decoder=True)
    stock = stock_layers(config)
    _require_attention(text, model_id, stock)
    kv_heads, head_dim = _common_heads(text, model_id, stock)
    return ModelInfo(
        id=model_id,
        revision=revision,
        layers=text.num_hidden_layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        config_sha256=fingerprint(config),
        stock=stock,
    )


def stock_layers(config: PreTrainedConfig) -> dict[int, str]:
    """Return the layers that have no full attention of their own, and their kind."""
    text = config.get_text_config(decoder=True)
    kinds, _ = get_layer_types_and_kwargs(text)
    crossed = getattr(text, "cross_attention_layers", None) or ()  # Mllama: they cache an image, once
    return {
        index: "cross_attention" if index in crossed else kind
        for index, kind in enumerate(kinds)
        if index in crossed or kind != _QUANTIZABLE
    }


def max_length(config: PreTrainedConfig) -> int | None:
    """Tokens that the model was made for; None where its configuration sets no limit."""
    text = config.get_text_config(decoder=True)
    limits = (getattr(text, name, None) for name in _LIMITS)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def fingerprint(config: PreTrainedConfig) -> str:
    """SHA-256 of what shapes the model: sizes, heads, positions, layer kinds.

    Independent of dtype, of generation settings, of weight quantization and of what a release of transformers adds.
    """
    text = config.get_text_config(decoder=True)
    stock = stock_layers(config)
    shape: dict[str, Any] = {name: getattr(text, name, None) for name in _SHAPE}
    shape["heads"] = sorted({_heads(layer) for layer in _attention_layers(text, stock)})
    shape["rope"] = _rope(getattr(text, "rope_parameters", None))
    shape["stock"] = sorted(stock.items())
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()


def _require_attention(text: PreTrainedConfig, model_id: str, stock: dict[int, str]) -> None:
    layers = _attention_layers(text, stock)
    if not layers:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(stock.values()).most_common())
        raise ModelError(f"{model_id} has no full-attention layer, so nothing to quantize: its layers are {kinds}")
    if getattr(text, "kv_lora_rank", None):
        raise ModelError(f"{model_id} has multi-head latent attention, whose cache kvmix cannot quantize yet")
    if not all(getattr(layer, "num_attention_heads", None) for layer in layers):
        raise ModelError(f"{model_id} has no attention heads ({text.model_type}), so nothing to quantize")


def _common_heads(text: PreTrainedConfig, model_id: str, stock: dict[int, str]) -> tuple[int, int]:
    heads = {_heads(layer) for layer in _attention_layers(text, stock)}
    if len(heads) > 1:
        shapes = ", ".join(f"{count} x {size}" for count, size in sorted(heads))
        raise ModelError(f"{model_id} has layers with different KV heads ({shapes}), which kvmix cannot plan for yet")
    kv_heads, head_dim = heads.pop()
    values = getattr(text, "v_head_dim", None) or head_dim
    if values != head_dim:
        raise ModelError(f"{model_id} has keys of {head_dim} but values of {values} channels: kvmix cannot plan for it")
    return kv_heads, head_dim


def _attention_layers(text: PreTrainedConfig, stock: dict[int, str]) -> list[Any]:
    """One configuration for every full-attention layer; only few families (Gemma 4) make them differ."""
    layers = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
    return [layer for index, layer in enumerate(layers) if index not in stock]


def _heads(layer: Any) -> tuple[int, int]:
    """KV heads and their size in one layer's cache."""
    heads = getattr(layer, "num_attention_heads", None) or 0
    head_dim = getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else 0)
    return _kv_heads(layer, heads), head_dim


def _kv_heads(layer: Any, heads: int) -> int:
    if layer.model_type == "falcon":
        # Falcon-40B computes `num_kv_heads` but repeats them before they reach the cache.
        return 1 if layer.multi_query and not layer.new_decoder_architecture else heads
    if layer.model_type == "gpt_bigcode":
        return 1 if layer.multi_query else heads
    if layer.model_type == "dbrx":
        return layer.attn_config.kv_n_heads
    return getattr(layer, "num_key_value_heads", None) or heads


def _rope(parameters: Any) -> Any:
    """The settings of rotary positions that have been stable, by layer type where they differ."""
    if not isinstance(parameters, dict):
        return None
    nested = {name: _rope(value) for name, value in parameters.items() if isinstance(value, dict)}
    return nested or {name: parameters[name] for name in _ROPE if parameters.get(name) is not None}
