"""Rotary positions, measured, against keys of whole texts at shifted positions."""

import pytest
import torch
import transformers
from profiling_models import wrap

from kvmix_cli.cache.rotary import measure_rotations, turned
from kvmix_cli.profiling.observer import observed

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {**SIZES, "head_dim": 16}
THETA = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
    **THETA,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, **THETA}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], **THETA}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}

ROTARY = {
    "llama": ("Llama", HEAD, ("half", 0, 16)),
    "llama3": ("Llama", {**HEAD, "rope_parameters": LLAMA3}, ("half", 0, 16)),
    "yarn": ("Llama", {**HEAD, "rope_parameters": YARN}, ("half", 0, 16)),
    "linear": ("Llama", {**HEAD, "rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}}, ("half", 0, 16)),
    "qwen2": ("Qwen2", SIZES, ("half", 0, 16)),
    "qwen3": ("Qwen3", HEAD, ("half", 0, 16)),
    "qwen2_vl": ("Qwen2VLText", {**SIZES, "rope_parameters": MROPE}, ("half", 0, 16)),
    "gpt_neox": ("GPTNeoX", {**SIZES, "rope_parameters": PARTIAL}, ("half", 0, 8)),
    "phi": ("Phi", {**SIZES, "rope_parameters": PARTIAL}, ("half", 0, 8)),
    "glm": ("Glm", {**HEAD, "rope_parameters": PARTIAL}, ("interleaved", 0, 8)),
    "cohere": ("Cohere", SIZES, ("interleaved", 0, 16)),
    "gemma3": ("Gemma3Text", {**HEAD, **SLIDING, "query_pre_attn_scalar": 16}, ("half", 0, 16)),
}
ABSOLUTE = {
    "gpt2": ("GPT2", {"vocab_size": 97, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1280}),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 64}),
}


def build(name, options, dtype=torch.float32, seed=0):
    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}Model")(config) if name == "Qwen2VLText" else None
    model = model or transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
        for module in model.modules():
            bias = getattr(getattr(module, "k_proj", None), "bias", None)
            if bias is not None:
                bias[::7] = 200.0  # as Qwen2's first and last layers have (transformers#35185)
    return wrap(model.to(dtype).eval())


def measure_ropes(loaded):
    return measure_rotations(loaded.model, loaded.info.quantizable, loaded.max_length)


def keys_at(loaded, start, tokens=12):
    """Return the keys of one text that begins at this position, by layer: `[H_kv, T, D]`."""
    ids = torch.arange(3, 3 + tokens)[None]
    found = {}
    with torch.no_grad(), observed(loaded, loaded.info.quantizable, lambda i, a, q, k, *_: found.update({i: k[0]})):
        loaded.model(input_ids=ids, position_ids=start + torch.arange(tokens)[None], use_cache=False)
    return found


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_rotation_that_is_found_is_that_of_a_shifted_text(family, dtype):
    name, options, (layout, start, channels) = ROTARY[family]
    loaded = build(name, options, dtype)
    ropes = measure_ropes(loaded)
    assert list(ropes) == loaded.info.quantizable
    here, there = keys_at(loaded, 0), keys_at(loaded, 1024)
    for index, rope in ropes.items():
        assert rope is not None, index
        assert (rope.layout, rope.start, 2 * len(rope.frequencies)) == (layout, start, channels)
        moved = turned(here[index].double(), rope, torch.full((12,), 1024))
        # angles are float32: 6e-5 of a radian at 1,024; bfloat16 has 8 bits, and deeper layers add up their roundings
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        assert (moved - there[index]).norm() <= tolerance * there[index].norm()
        assert torch.allclose(turned(moved, rope, torch.full((12,), -1024)), here[index].double(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", ABSOLUTE)
def test_no_rotation_is_found_where_there_is_none(family):
    loaded = build(*ABSOLUTE[family])
    assert measure_ropes(loaded) == dict.fromkeys(loaded.info.quantizable)


def test_layers_without_positions_have_no_rotation():
    loaded = build("SmolLM3", {**HEAD, "no_rope_layers": [1, 0, 1, 0]})
    assert [rope is not None for rope in measure_ropes(loaded).values()] == [True, False, True, False]


def test_a_rotation_that_no_frequencies_of_the_model_explain_is_none():
    loaded = build("Llama", HEAD)
    rotary = loaded.model.model.rotary_emb
    real = rotary.forward

    def faster(x, position_ids):
        return real(x, 2 * position_ids)

    rotary.forward = faster
    assert measure_ropes(loaded) == dict.fromkeys(loaded.info.quantizable)


def test_a_short_model_is_measured_within_its_positions():
    loaded = build("Llama", {**HEAD, "max_position_embeddings": 128})
    assert None not in measure_ropes(loaded).values()
