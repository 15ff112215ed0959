"""Small configurations of every architecture that transformers lists, made from its own defaults by tables of names."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 4160
"""That of builtin:tiny's tokenizer, and room for the tokens of images and sound."""
_FIRST_SPECIAL = 4100
_HEADS, _KV_HEADS, _HEAD_DIM, _WIDTH = 4, 2, 32, 128
_LONGEST = 512
_LISTS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

_NAMES: dict[int, str] = {
    _WIDTH: """hidden_size d_model n_embd embed_dim dim emb_dim word_embed_proj_dim embedding_size projection_dim
        out_hidden_size output_hidden_size projector_hidden_size text_hidden_size encoder_hidden_size vision_hidden_size
        hidden_size_global attention_hidden_size backbone_hidden_size output_dim image_text_hidden_size
        patch_embed_hidden_size projection_hidden_size thinker_hidden_size embedding_dim lru_width adapter_out_dim
        audio_hidden_size decoder_hidden_size qk_dim projector_input_dim projector_output_dim vision_output_dim
        router_hidden_size upsample_groups moe_hidden_size mamba_d_ssm input_embedding_size output_embedding_size""",
    2 * _WIDTH: """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff mlp_dim ffn_hidden_size
        intermediate_size_mlp dense_intermediate_size shared_intermediate_size n_inner dim_ff d_inner
        feed_forward_size projection_intermediate_size downsample_hidden_size hidden_dim""",
    64: """moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size qk_head_dim
        expert_ffn_hidden_size q_lora_rank shared_experts_intermediate_size share_expert_dim chunk_size
        attention_chunk_size num_position_embeddings""",
    _HEAD_DIM: """head_dim kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim linear_key_head_dim
        linear_value_head_dim swa_head_dim global_head_dim dim_head d_kv d_head mamba_d_head mamba_head_dim
        linear_head_dim kv_channels resampler_head_dim hidden_size_per_layer_input mamba_chunk_size
        attention_head_size swa_v_head_dim o_lora_rank ple_embed_dim""",
    24: "sliding_window index_topk sliding_window_size attention_window_size local_attention",
    16: """rotary_dim mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank laurel_rank d_rel
        num_mel_bins index_block_size encoder_hash_byte_group_vocab num_embeddings""",
    8: "mamba_n_heads mamba_num_heads num_filters",
    _HEADS: """num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads
        attention_heads linear_num_key_heads linear_num_value_heads swa_num_attention_heads num_experts num_local_experts
        n_routed_experts moe_num_experts num_sliding_attention_heads resampler_n_heads linear_num_heads
        resampler_n_latents num_query_tokens num_encoder_attention_heads num_decoder_attention_heads""",
    _KV_HEADS: """num_key_value_heads num_kv_heads num_global_key_value_heads swa_num_key_value_heads n_kv_heads
        num_query_groups index_n_heads num_experts_per_tok moe_topk depth encoder_layers decoder_layers
        zero_expert_num num_kv_shared_layers num_encoder_layers num_decoder_layers attn_layer_period expert_layer_period""",
    1: """n_group topk_group num_expert_group first_k_dense_replace attn_layer_offset expert_layer_offset mamba_n_groups
        n_groups num_nextn_predict_layers index_topk_blocks""",
    _LONGEST: "max_position_embeddings n_positions max_seq_len max_source_positions max_target_positions n_ctx seq_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
"""The size of every attribute of this name, in the configuration and those inside it."""
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers")
_INDEX_LISTS = (
    "full_attn_idxs moe_layers cross_attention_layers hybrid_layer_ids rope_scaling_layers attn_layer_indices".split()
)
"""Lists of layers, by number."""
_OTHERS_DEPTHS = ("fullatt_block_indexes", "deepstack_visual_indexes", "global_attn_indexes")
"""Lists of layers of an encoder of images."""
_BY_KIND = {
    kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    for kind in ("full_attention", "sliding_attention")
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {"init": {"vocabulary_map": {"<image>": _FIRST_SPECIAL}}},
    "cohere_compass": {"init": {"text_config": {"rope_parameters": _BY_KIND}}},
    "cohere_compass_text": {"init": {"rope_parameters": _BY_KIND}},
    "dbrx": {
        "init": {
            "attn_config": {"kv_n_heads": _KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 100.0},
            "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2},
        }
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {"init": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}}},
    "dots1": {"init": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}},
    "gemma4_assistant": {
        "init": {
            "text_config": {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
                "num_kv_shared_layers": 30,
            }
        }
    },
    "granite4_vision": {"init": {"deepstack_layer_map": [[-1, 0]]}},
    "lfm2_moe": {"init": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}, "num_dense_layers": 1},
    "qwen3_omni_moe": {"talker_config.text_config.shared_expert_intermediate_size": 64},
    "qwen4_exp": {"init": {"text_config": _INDEXER}},
    "qwen4_exp_text": {"init": _INDEXER},
    "reformer": {"init": {"is_decoder": True}, "axial_pos_embds_dim": (64, 64), "axial_pos_shape": (16, 32)},
}
"""Settings of model types whose defaults the tables do not fit."""


def model_types() -> list[str]:
    """Return every model type listed as a causal language model, or one that reads images or sound and writes text."""
    return sorted(set().union(*_LISTS))


def small_config(model_type: str, overrides: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Return a small configuration of a model type.

    Args:
        overrides: settings by path, such as `text_config.num_hidden_layers`; `init` has those that its class needs
            to be made at all.
    """
    settings = dict(overrides or {})
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](**settings.pop("init", {}))
    numbers = iter(range(_FIRST_SPECIAL, VOCABULARY))
    for part in parts(config):
        _shrink(part, numbers)
    for path, value in settings.items():
        *inner, name = path.split(".")
        part = config
        for key in inner:
            part = getattr(part, key)
        setattr(part, name, value)
    return config


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and all inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def _shrink(part: PreTrainedConfig, numbers: Iterator[int]) -> None:
    _cut_layers(part)
    for name, value in list(vars(part).items()):
        if name in SIZES and _is_number(value):
            setattr(part, name, min(value, SIZES[name]) if name.startswith("first_k") else SIZES[name])
        elif value is None and name in ("head_dim", "num_key_value_heads"):
            setattr(part, name, SIZES[name])
        elif name in SIZES and isinstance(value, (list, tuple)) and all(map(_is_number, value)):
            setattr(part, name, type(value)([SIZES[name]] * len(value)))
        elif name.endswith(("token_id", "token_index", "_id", "token_ids")):
            _renumber(part, name, value, numbers)
    if _is_number(getattr(part, "kv_lora_rank", None)) and hasattr(part, "num_key_value_heads"):
        part.num_key_value_heads = _HEADS
    if _is_number(getattr(part, "image_size", None)) and _is_number(getattr(part, "patch_size", None)):
        part.image_size = 4 * part.patch_size
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(getattr(part, name, None), dict):
            setattr(part, name, _rope(part, getattr(part, name)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _renumber(part: PreTrainedConfig, name: str, value: Any, numbers: Iterator[int]) -> None:
    """Give special tokens a number that the vocabulary has and text has not."""
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name in usual:
        setattr(part, name, usual[name])
    elif _is_number(value) and value >= 8:
        setattr(part, name, next(numbers))
    elif isinstance(value, (list, tuple)) and all(map(_is_number, value)):
        setattr(part, name, type(value)(next(numbers) for _ in value))


def _cut_layers(part: PreTrainedConfig) -> None:
    """Keep a layer of each kind, twice if there are few kinds."""
    depth = next((name for name in _DEPTHS if _is_number(getattr(part, name, None))), None)
    if depth is None:
        return
    count = getattr(part, depth)
    by_layer = {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, (list, tuple)) and len(value) == count > 1 and name not in _INDEX_LISTS
    }
    listed = {name: set(getattr(part, name)) for name in _INDEX_LISTS if isinstance(getattr(part, name, None), list)}
    kinds: dict[str, int] = {}
    for index in range(count):
        kind = [value[index] for value in by_layer.values()] + [index in value for value in listed.values()]
        kinds.setdefault(str(kind), index)
    kept = list(kinds.values())[:6]
    kept = (kept * 2 if len(kept) < 4 else kept) if len(kept) < count else kept
    for name, value in by_layer.items():
        setattr(part, name, type(value)(value[index] for index in kept))
    for name, layers in listed.items():
        setattr(part, name, [new for new, index in enumerate(kept) if index in layers])
    for name in _OTHERS_DEPTHS:
        if getattr(part, name, None):
            setattr(part, name, [len(kept) - 1])
    with suppress(NotImplementedError):  # an encoder-decoder has a depth for each part
        setattr(part, depth, len(kept))


def _rope(part: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of rotary positions whose lists fit the small head."""
    changed = {key: _rope(part, value) if isinstance(value, dict) else value for key, value in settings.items()}
    share = changed.get("partial_rotary_factor") or getattr(part, "partial_rotary_factor", None) or 1
    half = int(_HEAD_DIM * share) // 2
    for name in ("mrope_section", "xdrope_section"):
        if section := changed.get(name):
            rest = [max(1, half * size // sum(section)) for size in section[1:]]
            changed[name] = [half - sum(rest), *rest]
    for name in ("long_factor", "short_factor"):
        if name in changed:
            changed[name] = changed[name][:half]
    return changed
