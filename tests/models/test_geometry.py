"""Layers and heads from a configuration alone."""

import pytest
import transformers
from profiling_models import FAMILIES, LAYERS, build_config, load

from kvmix_cli.errors import ModelError
from kvmix_cli.models.geometry import fingerprint, max_length, model_info
from kvmix_cli.models.loading import load_info

GEMMA = {
    "num_hidden_layers": 3,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def info_of(name, **options):
    return model_info(getattr(transformers, name)(**options), "m")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(family):
    """That the numbers are those of the cache is shown in tests/models/test_projections.py."""
    info = model_info(build_config(family), "m", "r1")
    assert (info.id, info.revision, info.layers, info.stock) == ("m", "r1", LAYERS, {})
    assert info.quantizable == list(range(LAYERS))


@pytest.mark.parametrize(
    ("name", "options", "heads"),
    [
        ("LlamaConfig", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}, (3, 16)),
        ("LlamaConfig", {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 64}, (6, 64)),
        ("GPTNeoXConfig", {"hidden_size": 96, "num_attention_heads": 6}, (6, 16)),
        ("FalconConfig", {"num_attention_heads": 71, "hidden_size": 4544}, (1, 64)),
        ("FalconConfig", {"num_attention_heads": 8, "hidden_size": 64, "multi_query": False}, (8, 8)),
        ("GPTBigCodeConfig", {"n_head": 4, "n_embd": 64}, (1, 16)),
        ("MistralConfig", {"sliding_window": None, "head_dim": None}, (8, 128)),
        ("Gemma4TextConfig", {"global_head_dim": 96, "head_dim": 32, "num_key_value_heads": 4}, (4, 96)),
    ],
)
def test_heads(name, options, heads):
    info = info_of(name, **options)
    assert (info.kv_heads, info.head_dim) == heads


@pytest.mark.parametrize(
    ("name", "options", "heads"),
    [
        ("DeepseekV3Config", {}, "1 x 512 (values 64)"),
        ("MiMoV2FlashConfig", {"head_dim": 64, "v_head_dim": 32, "num_key_value_heads": 4}, "4 x 64 (values 32)"),
        ("CpmAntConfig", {"num_attention_heads": 4, "dim_head": 48}, "4 x 48"),
    ],
)
def test_heads_of_keys_and_values_that_differ_or_of_a_size_of_their_own(name, options, heads):
    assert [str(each) for each in info_of(name, **options).geometries] == [heads]


def test_heads_may_differ_by_layer():
    info = info_of("LlamaConfig", num_hidden_layers=4, per_layer_config={1: {"num_key_value_heads": 4}})
    assert {str(heads): layers for heads, layers in info.geometries.items()} == {"32 x 128": [0, 2, 3], "4 x 128": [1]}
    assert fingerprint(transformers.LlamaConfig(num_hidden_layers=4)) != info.config_sha256


@pytest.mark.slow
def test_layers_whose_cache_only_appends_are_planned_whatever_else_they_keep():
    assert info_of("DeepseekV32Config", num_hidden_layers=2).stock == {}
    assert info_of("FalconH1Config", num_hidden_layers=2).stock == {}
    kinds = ["hybrid", "hybrid_sliding"]
    assert info_of("InklingTextConfig", num_hidden_layers=2, layer_types=kinds).stock == {1: "hybrid_sliding"}
    with pytest.raises(ModelError, match="compressed_sparse_attention"):
        info_of("DeepseekV4Config")


def test_latents_without_a_rotary_part_are_left_as_they_are():
    """There is one tensor to decide about, where a plan has two."""
    assert info_of("MistralLarge4TextConfig", num_hidden_layers=8).stock == {3: "latent_only", 7: "latent_only"}
    kinds = ["linear_attention", "indexed_attention"]
    with pytest.raises(ModelError, match="its layers are 1 linear_attention, 1 latent_only"):
        info_of("Glm5NextTextConfig", num_hidden_layers=2, layer_types=kinds, indexer_types=["full"] * 2)


def test_layers_without_full_attention_are_named():
    assert info_of("Gemma3TextConfig", **GEMMA).stock == {0: "sliding_attention", 2: "sliding_attention"}
    kinds = ["linear_attention", "full_attention"]
    assert info_of("Qwen3NextConfig", num_hidden_layers=2, layer_types=kinds).stock == {0: "linear_attention"}


def test_the_text_part_of_a_multimodal_model_counts():
    config = transformers.Gemma3Config(text_config=transformers.Gemma3TextConfig(**GEMMA))
    assert model_info(config, "m").layers == 3
    assert fingerprint(config) == fingerprint(transformers.Gemma3TextConfig(**GEMMA))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("MambaConfig", {"num_hidden_layers": 4}, "no full-attention layer, .* its layers are 4 linear_attention"),
        ("MistralConfig", {"num_hidden_layers": 5}, "its layers are 5 sliding_attention"),
        ("RecurrentGemmaConfig", {"num_hidden_layers": 6}, "4 linear_attention, 2 sliding_attention"),
        ("RwkvConfig", {}, "no attention heads"),
        ("BltConfig", {}, r"not one stack of decoder layers .blt."),
        ("LlamaConfig", {"num_hidden_layers": -1}, r"-1 layers .num_hidden_layers.; expected 1 to 10000"),
        ("LlamaConfig", {"num_hidden_layers": 10**9}, "1000000000 layers"),
        ("LlamaConfig", {"num_hidden_layers": 10**400}, "a number of 333 hexadecimal digits as its num_hidden_layers"),
        ("LlamaConfig", {"intermediate_size": -(10**400)}, "a number of .* as its intermediate_size; expected 1"),
        ("LlamaConfig", {"intermediate_size": 0}, "0 as its intermediate_size; expected 1 to"),
        ("Qwen3MoeConfig", {"moe_intermediate_size": 0}, "0 as its moe_intermediate_size; expected 1 to"),
        ("Gemma3nTextConfig", {"intermediate_size": [8] * 34 + [0]}, "0 as its intermediate_size; expected 1 to"),
        ("LlamaConfig", {"head_dim": 0}, "0 as its head_dim; expected 1 to"),
        ("Gemma3TextConfig", {"head_dim": 0}, "0 as its head_dim; expected 1 to"),
        ("DeepseekV3Config", {"kv_lora_rank": 0}, "0 as its kv_lora_rank; expected 1 to"),
        ("DeepseekV3Config", {"v_head_dim": 0}, "0 as its v_head_dim; expected 1 to"),
        ("DeepseekV3Config", {"qk_nope_head_dim": -1}, "-1 as its qk_nope_head_dim; expected 0 to"),
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
            "0 as its rope_theta; expected a",
        ),
        ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "nan as its rope_"),
        ("LlamaConfig", {"vocab_size": -1}, "-1 as its vocab_size; expected 1 to 9007199254740991: correct its"),
        ("LlamaConfig", {"hidden_size": 0}, "0 as its hidden_size"),
        ("LlamaConfig", {"num_key_value_heads": 0}, "0 as its num_key_value_heads"),
        ("LlamaConfig", {"head_dim": -64}, "-64 as its head_dim; expected 1 to"),
        ("LlamaConfig", {"num_key_value_heads": 3}, "32 query heads and 3 KV heads in layer 0"),
    ],
)
def test_models_with_nothing_to_quantize(name, options, message):
    with pytest.raises(ModelError, match=f"^m has .*{message}") as error:
        info_of(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "limit"),
    [
        ("LlamaConfig", {"max_position_embeddings": 77}, 77),
        ("GPT2Config", {"n_positions": 77}, 77),
        ("MptConfig", {"max_seq_len": 77}, 77),
        ("BloomConfig", {}, None),
    ],
)
def test_the_longest_input(name, options, limit):
    assert max_length(getattr(transformers, name)(**options)) == limit


# Fingerprint

LLAMA = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 50,
}


def llama(**changes):
    return fingerprint(transformers.LlamaConfig(**{**LLAMA, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 128},
        {"num_attention_heads": 8},
        {"num_key_value_heads": 4},
        {"num_hidden_layers": 3},
        {"head_dim": 32},
        {"vocab_size": 51},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ],
)
def test_another_shape_has_another_fingerprint(changes):
    assert llama(**changes) != llama()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000},
        {"rope_type": "linear", "rope_theta": 10000, "factor": 4},
        {"full_attention": {"rope_theta": 10000, "factor": 4}, "sliding_attention": {"rope_theta": 500}},
    ],
)
def test_equal_numbers_have_the_same_fingerprint(rope):
    def real(value):
        return {name: real(each) for name, each in value.items()} if isinstance(value, dict) else as_float(value)

    def as_float(value):
        return float(value) if isinstance(value, int) else value

    config = transformers.LlamaConfig(**LLAMA)
    digests = set()
    for parameters in (rope, real(rope)):
        config.rope_parameters = parameters
        digests.add(fingerprint(config))
    assert len(digests) == 1
    assert llama(rope_theta=10000) == llama(rope_theta=10000.0) == llama()


def test_checksums_of_earlier_releases_stay_valid():
    """Stored in profiles/builtin--tiny."""
    stored = "c2f7244b8e21c5ac7c84d38814de119da9ef345d060ec0f1ceaa9afd2a0cecda"
    assert load_info("builtin:tiny").config_sha256 == stored


def test_another_family_has_another_fingerprint():
    assert fingerprint(transformers.Qwen2Config(**LLAMA)) != llama()
    same = {**GEMMA, "layer_types": ["full_attention", *GEMMA["layer_types"][1:]]}
    one, other = (fingerprint(transformers.Gemma3TextConfig(**options)) for options in (GEMMA, same))
    assert one != other


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"use_cache": False},
        {"attn_implementation": "eager"},
        {"transformers_version": "9.9.9"},
        {"something_new": 1},
        {"attention_dropout": 0.1},
        {"eos_token_id": 3},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
)
def test_the_same_shape_has_the_same_fingerprint(changes):
    assert llama(**changes) == llama()


def test_a_fingerprint_survives_saving(tmp_path):
    config = load("llama").model.config
    config.save_pretrained(tmp_path)
    assert fingerprint(transformers.AutoConfig.from_pretrained(tmp_path)) == fingerprint(config)
