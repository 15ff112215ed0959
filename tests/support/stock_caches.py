"""Small models of families whose cache is more than growing keys and values: shared, crossed, recurrent."""

import torch
import transformers
from architectures import _COMMON, _GQA, GEOMETRIES, VOCABULARY, build
from architectures import CONFIGS as PLAIN
from multimodal import NAMES, config_of, tokenizer_of

from kvmix_cli.models.multimodal import find_loader

_KINDS = ["linear_attention", "full_attention"] * 2
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "attention_heads": 4,
    "intermediate_size": 48,
    "vision_output_dim": 64,
}
_SHARED = {
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 16}
_MOE = {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 32}


def _mllama():
    text = {**_COMMON, "num_key_value_heads": 2, "cross_attention_layers": [1, 3]}
    vision = {
        **_VISION,
        "image_size": 28,
        "patch_size": 14,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    }
    vision |= {"intermediate_layers_indices": [0], "num_global_layers": 1}
    return transformers.MllamaConfig(text_config=text, vision_config=vision)


CONFIGS = {
    "shared": lambda: transformers.Gemma4TextConfig(**_GQA, **_SHARED),
    "shared, Gemma 3n": lambda: transformers.Gemma3nTextConfig(
        **{**_GQA, "intermediate_size": 96}, **_SHARED, laurel_rank=8, activation_sparsity_pattern=None
    ),
    "cross": _mllama,
    "convolution": lambda: transformers.Lfm2Config(
        **{**_COMMON, "num_key_value_heads": 2}, layer_types=["conv", "full_attention"] * 2
    ),
    "Mamba": lambda: transformers.JambaConfig(
        **{**_COMMON, "num_key_value_heads": 2},
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "Mamba-2": lambda: transformers.BambaConfig(
        **{**_COMMON, "num_key_value_heads": 2}, **_MAMBA2, attn_layer_indices=[1, 3]
    ),
    "Mamba-2 of Granite": lambda: transformers.GraniteMoeHybridConfig(
        **{**_COMMON, "num_key_value_heads": 2}, **_MAMBA2, **_MOE, layer_types=["mamba", "attention"] * 2
    ),
    "Mamba-2 of Nemotron": lambda: transformers.NemotronHConfig(
        **{**_GQA, "num_hidden_layers": 4},
        hybrid_override_pattern="M*M*",
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=16,
    ),
    "Mamba-2 beside attention": lambda: transformers.Zamba2Config(
        **{**_COMMON, "num_key_value_heads": 4},
        mamba_d_state=16,
        mamba_ngroups=1,
        n_mamba_heads=8,
        chunk_size=16,
        layers_block_type=["mamba", "hybrid"] * 2,
        num_mem_blocks=1,
        use_mem_rope=False,
    ),
    "delta rule": lambda: transformers.OlmoHybridConfig(
        **{**_COMMON, "num_key_value_heads": 2},
        layer_types=_KINDS,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "chunked": lambda: transformers.Llama4TextConfig(
        **_GQA, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=24
    ),
}

FAMILIES = [*PLAIN, *GEOMETRIES, *CONFIGS, *(f"{name} with images" for name in NAMES)]


def config_named(name):
    """The configuration of a family."""
    if name in CONFIGS:
        return CONFIGS[name]()
    if name.endswith(" with images"):
        name = name.removesuffix(" with images")
        return config_of(name, tokenizer_of(name))
    class_name, options = {**PLAIN, **GEOMETRIES}[name]
    return getattr(transformers, class_name)(**options)


def model_named(name, dtype):
    """A model of a family with random weights."""
    if name in PLAIN or name in GEOMETRIES:
        return build(name, dtype)
    config = config_named(name)
    torch.manual_seed(0)
    return find_loader(config).from_config(config, dtype=dtype).eval()
