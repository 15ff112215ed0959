"""Small configurations of every architecture that transformers lists, made from its own defaults by tables of names."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 4160
"""That of builtin:tiny's tokenizer, and room for the tokens of images and sound."""
FIRST_SPECIAL = 4100
HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 32, 128
CONTEXT = 512
LISTS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
_NAMES: dict[int, str] = {
    WIDTH: """hidden_size d_model n_embd embed_dim dim emb_dim word_embed_proj_dim embedding_size projection_dim
        out_hidden_size output_hidden_size projector_hidden_size text_hidden_size encoder_hidden_size vision_hidden_size
        hidden_size_global backbone_hidden_size output_dim image_text_hidden_size adapter_in_dim adapter_input_size
        patch_embed_hidden_size projection_hidden_size thinker_hidden_size embedding_dim lru_width adapter_out_dim
        audio_hidden_size decoder_hidden_size qk_dim projector_input_dim projector_output_dim vision_output_dim
        router_hidden_size upsample_groups moe_hidden_size input_embedding_size output_embedding_size""",
    2 * WIDTH: """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff dff mlp_dim ffn_hidden_size
        intermediate_size_mlp dense_intermediate_size shared_intermediate_size n_inner dim_ff d_inner mamba_d_ssm
        feed_forward_size projection_intermediate_size downsample_hidden_size hidden_dim attention_hidden_size""",
    2 * HEAD_DIM: """moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
        qk_head_dim expert_ffn_hidden_size q_lora_rank shared_experts_intermediate_size share_expert_dim chunk_size
        attention_chunk_size num_position_embeddings attention_head_dim kv_lora_rank""",
    HEAD_DIM: """head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim linear_key_head_dim
        linear_value_head_dim swa_head_dim global_head_dim dim_head d_kv d_head mamba_d_head mamba_head_dim
        linear_head_dim kv_channels resampler_head_dim hidden_size_per_layer_input mamba_chunk_size mamba_headdim
        attention_head_size swa_v_head_dim o_lora_rank ple_embed_dim""",
    24: "sliding_window sliding_window_size attention_window_size local_attention",
    48: "index_topk",
    16: """rotary_dim mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank laurel_rank d_rel
        num_mel_bins index_block_size encoder_hash_byte_group_vocab num_embeddings""",
    8: "mamba_n_heads mamba_num_heads n_mamba_heads num_filters",
    HEADS: """num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads
        attention_heads linear_num_key_heads linear_num_value_heads swa_num_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts num_sliding_attention_heads resampler_n_heads
        linear_num_heads resampler_n_latents num_query_tokens num_encoder_attention_heads
        num_decoder_attention_heads""",
    KV_HEADS: """num_key_value_heads num_kv_heads num_global_key_value_heads swa_num_key_value_heads n_kv_heads
        index_n_heads num_experts_per_tok num_experts_per_token moe_k moe_topk depth encoder_layers decoder_layers
        zero_expert_num num_kv_shared_layers num_encoder_layers num_decoder_layers attn_layer_period
        expert_layer_period""",
    1: """n_group topk_group num_expert_group first_k_dense_replace attn_layer_offset expert_layer_offset mamba_n_groups
        n_groups num_nextn_predict_layers index_topk_blocks""",
    CONTEXT: """max_position_embeddings n_positions max_seq_len max_source_positions max_target_positions n_ctx
        seq_length""",
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
"""The size of every setting of this name, in the configuration and those inside it."""
DERIVED = ("head_dim", "num_key_value_heads", "num_experts_per_tok")
"""Settings that have a size even where the default leaves them out."""
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers")
INDEX_LISTS = (
    "full_attn_idxs",
    "moe_layers",
    "cross_attention_layers",
    "hybrid_layer_ids",
    "rope_scaling_layers",
    "attn_layer_indices",
)
"""Lists of layers, by number."""
ENCODER_LISTS = ("fullatt_block_indexes", "deepstack_visual_indexes", "global_attn_indexes")
"""Lists of layers of an encoder of images, by number."""
MOST_KINDS = 6
"""Layers of a model that has layers of many kinds."""
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MROPE = (
    "ernie4_5_vl_moe_text",
    "glm4v_text",
    "glm4v_moe_text",
    "glm_ocr_text",
    "hunyuan_vl_text",
    "paddleocr_vl_text",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen2_5_omni_text",
)
"""Text parts whose class has sections of rotary positions that their default configuration does not name."""
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
_ASSISTED = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
_EXPERTS = {"num_experts": HEADS, "top_k_experts": 2, "moe_intermediate_size": 64}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"init": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4}},
    "chameleon": {"init": {"vocabulary_map": {"<image>": FIRST_SPECIAL}}},
    "cohere_compass": {"init": {"text_config": {"rope_parameters": _BY_KIND}}},
    "cohere_compass_text": {"init": {"rope_parameters": _BY_KIND}},
    "dbrx": {
        "init": {
            "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 100.0},
            "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2},
        }
    },
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {"init": {"text_config": _EXPERTS}},
    "dots1": {"init": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}},
    "dots3_note": {"text_config.head_dim": 80},
    "dots3_note_text": {"head_dim": 80},
    "emu3": {
        "init": {"vocabulary_map": {"<image>": FIRST_SPECIAL, "<|extra_200|>": FIRST_SPECIAL + 1}},
        "vq_config.base_channels": 32,
        "vq_config.codebook_size": 64,
    },
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [5, 5, 6]},
    "fun_asr_nano": {"adaptor_config.intermediate_size": WIDTH // 4},
    "gemma4_assistant": {
        "init": {"text_config": {"model_type": "gemma4_text", **_ASSISTED}},
        "text_config.num_kv_shared_layers": 4,
    },
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 4},
    "granite4_vision": {"init": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "4/8"}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "lfm2_moe": {
        "init": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
        "num_dense_layers": 1,
    },
    "mamba2": {"head_dim": 64},
    "mimo_v2_flash": {"head_dim": 2 * HEAD_DIM, "swa_head_dim": 2 * HEAD_DIM},
    "ministral": {"layer_types": ["full_attention", "sliding_attention"]},
    "mistral": {"sliding_window": None},
    "mistral4": {"head_dim": 2 * HEAD_DIM},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "nemo_speechlm": {
        "audio_config.asr_config.num_key_value_heads": HEADS,
        "audio_config.diarization_config.audio_config.num_key_value_heads": HEADS,
        "word_timestamp_config.num_key_value_heads": HEADS,
    },
    "qwen2_5_omni": {"thinker_config.vision_start_token_id": VOCABULARY - 1},
    "qwen2_5_omni_thinker": {"vision_start_token_id": VOCABULARY - 1},
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 64,
        "talker_config.spatial_merge_size": 2,
        "thinker_config.vision_start_token_id": VOCABULARY - 1,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCABULARY - 1},
    "qwen4_exp": {"init": {"text_config": _INDEXER}},
    "qwen4_exp_text": {"init": _INDEXER},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"init": {"is_decoder": True}, "axial_pos_embds_dim": (64, 64), "axial_pos_shape": (16, 32)},
    "step3p7": {"text_config.sliding_window": 24},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""Settings of model types whose defaults the tables do not fit, by path, such as `text_config.num_hidden_layers`.
`init` has those that a class needs to be made at all."""


def model_types() -> list[str]:
    """Return every model type listed as a causal language model, or one that reads images or sound and writes text."""
    return sorted(set().union(*LISTS))


def small_config(model_type: str) -> PreTrainedConfig:
    """Return a small configuration of a model type, as one read from a file."""
    settings = dict(OVERRIDES.get(model_type, {}))
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](**settings.pop("init", {}))
    small = _shrunk(config, iter(range(FIRST_SPECIAL, VOCABULARY)))
    if model_type in LISTS[0] and getattr(config, "is_decoder", None) is False:
        small["is_decoder"] = True  # BERT and kin are encoders unless they are told
    for path, value in settings.items():
        *inner, name = path.split(".")
        part = small
        for key in inner:
            part = part[key]
        part[name] = value
    return type(config).from_dict(small)


def _shrunk(config: PreTrainedConfig, numbers: Iterator[int]) -> dict[str, Any]:
    """Return the small settings of a configuration and all inside it.

    Args:
        numbers: of tokens that are in the vocabulary, and that text does not have.
    """
    settings = config.to_dict()
    _cut_layers(settings)
    for name, value in list(settings.items()):
        if isinstance(vars(config).get(name), PreTrainedConfig):
            settings[name] = _shrunk(vars(config)[name], numbers)
        elif name.endswith(("token_id", "token_index", "_id", "token_ids")):
            settings[name] = _renumbered(name, value, numbers)
        elif name in SIZES:
            settings[name] = _resized(name, value)
    if _is_size(settings.get("kv_lora_rank")) and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if _is_size(settings.get("image_size")) and _is_size(settings.get("patch_size")):
        settings["image_size"] = 4 * settings["patch_size"]
    if settings.get("attention_multiplier") == 1.0:
        settings["attention_multiplier"] = HEAD_DIM**-0.5  # Granite's default is that of no checkpoint
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(settings.get(name), dict):
            sections = {"mrope_section": [16, 24, 24]} if settings["model_type"] in MROPE else {}
            settings[name] = _rope({**settings[name], **sections}, settings.get("partial_rotary_factor"))
    return settings


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _resized(name: str, value: Any) -> Any:
    """Return the value of a setting whose size is in the table; of the first dense layers no more than there were."""
    if _is_size(value):
        return min(value, SIZES[name]) if name.startswith("first_k") else SIZES[name]
    if value is None and name in DERIVED:
        return SIZES[name]
    if isinstance(value, (list, tuple)) and value and all(map(_is_size, value)):
        return [SIZES[name]] * len(value)
    return value


def _renumbered(name: str, value: Any, numbers: Iterator[int]) -> Any:
    """Return the number of a special token that the vocabulary has."""
    if name in TOKENS:
        return TOKENS[name]
    if _is_size(value) and value >= 8:
        return next(numbers)
    if isinstance(value, (list, tuple)) and all(map(_is_size, value)):
        return [next(numbers) for _ in value]
    return value


def _cut_layers(settings: dict[str, Any]) -> None:
    """Keep a layer of each kind, twice if there are few kinds."""
    depth = next((name for name in DEPTHS if _is_size(settings.get(name))), None)
    if depth is None:
        return
    count = settings[depth]
    by_layer = {
        name: value
        for name, value in settings.items()
        if isinstance(value, (list, tuple)) and len(value) == count > 1 and name not in INDEX_LISTS
    }
    listed = {name: set(settings[name]) for name in INDEX_LISTS if isinstance(settings.get(name), list)}
    own = {int(index): each for index, each in (settings.get("per_layer_config") or {}).items()}
    kinds: dict[str, int] = {}
    for index in range(count):
        kind = [value[index] for value in by_layer.values()] + [index in value for value in listed.values()]
        kinds.setdefault(str((kind, own.get(index))), index)
    kept = list(kinds.values())[:MOST_KINDS]
    kept = (kept * 2 if len(kept) < 4 else kept) if len(kept) < count else kept
    for name, value in by_layer.items():
        settings[name] = [value[index] for index in kept]
    for name, layers in listed.items():
        settings[name] = [new for new, index in enumerate(kept) if index in layers]
    for name in ENCODER_LISTS:
        if settings.get(name):
            settings[name] = [len(kept) - 1]
    if own:
        settings["per_layer_config"] = {
            new: _in_proportion(own[index], settings) for new, index in enumerate(kept) if index in own
        }
    settings[depth] = len(kept)


def _in_proportion(own: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of one layer, as much larger than those of the others as they were."""
    small = {
        name: max(1, value * SIZES[name] // settings[name]) if name in SIZES and _is_size(settings.get(name)) else value
        for name, value in own.items()
    }
    if "kv_lora_rank" in settings and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _rope(settings: dict[str, Any], share: float | None) -> dict[str, Any]:
    """Return settings of rotary positions whose lists fit the small head."""
    changed = {key: _rope(value, share) if isinstance(value, dict) else value for key, value in settings.items()}
    half = int(HEAD_DIM * (changed.get("partial_rotary_factor") or share or 1)) // 2
    for name in ("mrope_section", "xdrope_section"):
        if section := changed.get(name):
            rest = [max(1, half * size // sum(section)) for size in section[1:]]
            changed[name] = [half - sum(rest), *rest]
    for name in ("long_factor", "short_factor"):
        if name in changed:
            changed[name] = changed[name][:half]
    return changed
