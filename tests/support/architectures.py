"""Small, randomly initialised models of many families, built from their configurations."""

import pytest
import torch
import transformers
from reference import dense_attention
from transformers.masking_utils import sdpa_mask

from kvmix_cli.cache.rotary import know_rotations

VOCABULARY = 199
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GQA = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16}
_SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

CONFIGS = {
    "llama": ("LlamaConfig", _GQA),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": None}),
    "qwen2": ("Qwen2Config", _COMMON | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", _GQA),
    "gemma2": ("Gemma2Config", {**_GQA, **_SLIDING, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {**_GQA, **_SLIDING, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", _COMMON | {"num_key_value_heads": 2, "sliding_window": None}),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
    "falcon": ("FalconConfig", {**_COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt_oss": ("GptOssConfig", {**_GQA, **_SLIDING, **_EXPERTS}),
}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
_INDEXED = {**_LATENT, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 24}
_MAMBA = {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MOE = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2}
GEOMETRIES = {
    "latent": ("DeepseekV3Config", _LATENT),
    "latent, indexed": ("DeepseekV32Config", _INDEXED),
    "wider values": (
        "MiMoV2FlashConfig",
        {
            **_GQA,
            **_SLIDING,
            "v_head_dim": 32,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "topk_group": 1,
        },
    ),
    "values from keys": (
        "Gemma4TextConfig",
        {
            **_GQA,
            **_SLIDING,
            "attention_k_eq_v": True,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "heads by layer": (
        "LlamaConfig",
        {**_GQA, "per_layer_config": {1: {"num_key_value_heads": 4}}, "allow_global_per_layer_attribute_access": True},
    ),
    "hybrid": ("FalconH1Config", {**_GQA, **_MAMBA, "mamba_chunk_size": 16}),
    "linear and full": ("Qwen3NextConfig", {**_GQA, **_LINEAR, **_MOE}),
}
"""Models whose layers differ in their heads, or keep more than keys and values."""
QUICK = ("llama", "gemma3")
"""Families that `make test-quick` builds: without and with sliding windows."""
NO_KVMIX_ATTENTION = {"falcon"}
"""Families that do not go through transformers' attention interface: handles carry them."""
NO_SDPA = {"gemma2", "gpt_oss"}


def build(
    name: str, dtype: torch.dtype = torch.float64, seed: int = 0, wide: bool = False
) -> transformers.PreTrainedModel:
    """A model with weights large enough for attention to be far from uniform; `wide` has half as many heads, of 32."""
    class_name, options = {**CONFIGS, **GEOMETRIES}[name]
    if wide:
        options = {**options, "num_attention_heads": 2} | ({"head_dim": 32} if "head_dim" in options else {})
    config = getattr(transformers, class_name)(**options)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if name == "heads by layer":
        _as_many_kv_heads_as_queries(model.model.layers[1].self_attn)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
            elif "sinks" in parameter_name:
                parameter.normal_(0, 1)
    if name == "qwen2":
        _spike_key_biases(model)
    if name in ("gpt_oss", "latent"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    model = model.to(dtype).eval()
    know_rotations(model)
    return model


def case(family: str, *others: object) -> object:
    """The arguments of a test of one family, which is slow unless the family is a quick one."""
    return pytest.param(family, *others, marks=() if family in QUICK else pytest.mark.slow)


def implementations(name: str) -> list[str]:
    """The attention implementations this family can run under."""
    known = ["eager"]
    if name not in NO_SDPA:
        known.append("sdpa")
    if name not in NO_KVMIX_ATTENTION:
        known.append("kvmix")
    return known


def reference_implementation(name: str, implementation: str) -> str:
    """What to compare an implementation with: itself under `eager` (it rounds to float32), else dense float64."""
    return implementation if implementation == "eager" or name in NO_KVMIX_ATTENTION else "dense64"


def _dense64(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
    output = dense_attention(query, key, value, scaling, attention_mask, softcap, s_aux)
    return output.transpose(1, 2).contiguous().to(query.dtype), None


transformers.AttentionInterface.register("dense64", _dense64)
transformers.AttentionMaskInterface.register("dense64", sdpa_mask)


def _as_many_kv_heads_as_queries(attention: torch.nn.Module) -> None:
    """Llama's class builds layers that are alike, but runs others."""
    attention.num_key_value_groups = 1
    attention.k_proj, attention.v_proj = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))


def _spike_key_biases(model: transformers.PreTrainedModel) -> None:
    """Qwen2's first and last layers have key biases of several hundred on a few channels (transformers#35185)."""
    with torch.no_grad():
        for layer in (model.model.layers[0], model.model.layers[-1]):
            layer.self_attn.k_proj.bias[::7] = 200.0
