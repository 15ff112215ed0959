"""The weights that `find_projections` names make the keys, or the values, of their layer: all, and nothing else."""

import pytest
import torch
from profiling_models import FAMILIES, FUSED, LAYERS, load, token_ids, wrap
from torch import nn
from transformers import AutoModelForCausalLM, GitConfig

from kvmix_cli.cache.mixed import unquantized_cache
from kvmix_cli.errors import ProjectionError
from kvmix_cli.models.projections import find_projections, packed_modules


@torch.no_grad()
def cached(loaded, layer):
    """Keys and values `[H_kv, T, D]` of one layer after a prompt."""
    cache = unquantized_cache(loaded.model.config)
    loaded.model(token_ids(9), past_key_values=cache, use_cache=True)
    return cache.layers[layer].keys[0], cache.layers[layer].values[0]


@torch.no_grad()
def perturb(projection):
    """Change the projection's own part of its weight, and only that."""
    weight = projection.weight
    features = torch.arange(weight.shape[projection.axis]) if projection.features is None else projection.features
    noise = torch.zeros_like(weight)
    size = list(weight.shape)
    size[projection.axis] = len(features)
    noise.index_copy_(projection.axis, features, torch.randn(size, generator=torch.Generator().manual_seed(1)))
    weight.add_(noise)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["k", "v"])
def test_changing_a_projection_changes_its_half_of_the_cache(family, kind):
    loaded, layer = load(family), 1
    keys, values = cached(loaded, layer)
    assert keys.shape[0] == values.shape[0] == loaded.info.kv_heads
    assert keys.shape[2] == values.shape[2] == loaded.info.head_dim
    perturb(getattr(find_projections(loaded.model, loaded.info)[layer], kind))
    new_keys, new_values = cached(loaded, layer)
    if kind == "k":
        assert (new_keys != keys).all(), "some key does not depend on the weight"
        assert torch.equal(new_values, values)
    else:
        assert torch.equal(new_keys, keys)
        assert (new_values != values).all(), "some value does not depend on the weight"


@pytest.mark.parametrize("family", FUSED)
def test_what_is_left_of_a_fused_weight_is_the_query(family):
    loaded, layer = load(family), 1
    keys, values = cached(loaded, layer)
    k, v = find_projections(loaded.model, loaded.info)[layer]
    assert k.weight is v.weight
    taken = torch.cat([k.features, v.features])
    assert len(set(taken.tolist())) == len(taken)
    rest = torch.ones(k.weight.shape[k.axis], dtype=torch.bool)
    rest[taken] = False
    with torch.no_grad():
        (k.weight if k.axis == 0 else k.weight.T)[rest] += 1.0
    assert all(torch.equal(new, old) for new, old in zip(cached(loaded, layer), (keys, values), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_found_once(family):
    loaded = load(family)
    found = find_projections(loaded.model, loaded.info)
    assert list(found) == list(range(LAYERS))
    assert len({pair.k.name for pair in found.values()}) == LAYERS
    parameters = dict(loaded.model.named_parameters())
    assert all(parameters[projection.name] is projection.weight for pair in found.values() for projection in pair)


def test_layers_with_a_stock_cache_are_left_out():
    loaded = load("llama")
    info = loaded.info.model_copy(update={"stock": {1: "sliding_attention"}})
    assert list(find_projections(loaded.model, info)) == [0, 2]


def test_unknown_projections_are_named():
    loaded = load("llama")
    for layer in loaded.model.model.layers:
        layer.self_attn.kk = layer.self_attn.k_proj
        del layer.self_attn.k_proj
    with pytest.raises(
        ProjectionError, match=r"layer 0 \(LlamaDecoderLayer\).*k_proj/v_proj.*query_key_value.*it has .*kk"
    ):
        find_projections(loaded.model, loaded.info)


def test_an_unknown_arrangement_is_not_guessed():
    loaded = load("gpt2")
    loaded.model.config.model_type = "another"
    with pytest.raises(ProjectionError, match=r"tell K and V apart in transformer.h.0.attn.c_attn.weight.*is another"):
        find_projections(loaded.model, loaded.info)


def test_an_encoder_of_images_of_the_same_depth_is_not_the_decoder():
    """GIT has both inside what it names its decoder."""
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GitConfig(**sizes, intermediate_size=48, vision_config={**vision, "image_size": 32, "patch_size": 16})
    loaded = wrap(AutoModelForCausalLM.from_config(config))
    found = find_projections(loaded.model, loaded.info)
    assert all(pair.k.name.startswith("git.encoder.layer.") for pair in found.values())


def test_another_depth_is_an_error():
    loaded = load("llama")
    with pytest.raises(ProjectionError, match="ModuleList of 7"):
        find_projections(loaded.model, loaded.info.model_copy(update={"layers": 7}))


def test_an_offloaded_weight_is_an_error():
    loaded = load("llama")
    weight = nn.Parameter(torch.empty(16, 32, device="meta"), requires_grad=False)
    loaded.model.model.layers[2].self_attn.v_proj.weight = weight
    with pytest.raises(ProjectionError, match=r"layer 2 of small is offloaded .*v_proj\.weight"):
        find_projections(loaded.model, loaded.info)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_packed_weights_are_found_by_their_modules(family):
    """Whatever a library calls its tensors, and whether there is a `weight`."""
    loaded = load(family)
    dense = find_projections(loaded.model, loaded.info)
    for pair in dense.values():
        module = pair.k.module
        if getattr(module, "weight", None) is not None:
            del module.weight
            module.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))
    packed = find_projections(loaded.model, loaded.info)
    for one, other in zip(dense.values(), packed.values(), strict=True):
        assert (one.k.name, one.k.module) == (other.k.name, other.k.module)
        assert other.k.weight is None
        if one.k.features is not None:
            assert torch.equal(one.k.features, other.k.features)
            assert torch.equal(one.v.features, other.v.features)
    kinds = {type(module) for module in packed_modules(loaded.model)}
    assert kinds == {nn.Linear}
