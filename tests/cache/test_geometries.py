"""Models whose layers differ in their heads, or keep more than keys and values: latents, sparse indexing, hybrids."""

import pytest
import torch
from architectures import GEOMETRIES, VOCABULARY, build
from profiling_models import ByteTokenizer
from teaching import ids, teacher_forced

from kvmix_cli.allocation import Budget, allocate
from kvmix_cli.cache.baselines.named import named_cache
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.errors import ModelError
from kvmix_cli.models.causality import check_causal
from kvmix_cli.models.geometry import model_info
from kvmix_cli.models.loading import LoadedModel
from kvmix_cli.plan import CacheSettings, HeadGeometry, Plan
from kvmix_cli.plan.tokens import Tier, TokenPolicy
from kvmix_cli.plan.transforms import Center, Rotate, Transforms
from kvmix_cli.plan.windows import Recent
from kvmix_cli.profiling.run import run_profile
from kvmix_cli.reporting.words import layers_json, layers_text

SETTINGS = CacheSettings(page=16, sink=4, group_size=16, window=Recent(tokens=10))
HEADS = {
    "latent": {(1, 32, 16): [0, 1, 2, 3]},
    "latent, indexed": {(1, 32, 16): [0, 1, 2, 3]},
    "wider values": {(2, 16, 32): [1, 3]},
    "heads by layer": {(2, 16, 16): [0, 2, 3], (4, 16, 16): [1]},
    "values from keys": {(1, 32, 32): [1, 3]},
    "hybrid": {(2, 16, 16): [0, 1, 2, 3]},
    "linear and full": {(2, 16, 16): [1, 3]},
}
STATEFUL = ("latent, indexed", "hybrid")


@pytest.fixture(scope="module")
def models():
    """The models by name, each built once."""
    built = {}

    def model(name):
        return built[name] if name in built else built.setdefault(name, build(name, torch.float32))

    return model


@pytest.fixture(params=GEOMETRIES)
def model(request, models):
    return models(request.param)


def plan_of(model, bits, settings=SETTINGS):
    return Plan.uniform(model_info(model.config, "m"), bits, bits, settings)


def generate(model, cache, **options):
    """Greedy continuations of two prompts, one of them padded on the left."""
    prompt = ids(50)
    mask = torch.ones_like(prompt)
    mask[0, :20] = 0
    return model.generate(
        prompt, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=16, **options
    )


@pytest.mark.parametrize("name", GEOMETRIES)
def test_heads_are_those_that_the_cache_receives(name, models):
    info = model_info(models(name).config, "m")
    found = {(each.kv_heads, each.key_dim, each.value_dim): layers for each, layers in info.geometries.items()}
    assert found == HEADS[name]
    check_causal(models(name), "m", info)


def test_other_heads_than_the_configuration_tells_are_refused(models):
    model = models("latent")
    info = model_info(model.config, "m").model_copy(update={"head_dim": 48})
    with pytest.raises(ModelError, match=r"layer 0 of m caches heads of 1 x 32 \(values 16\), .* tells of 1 x 48"):
        check_causal(model, "m", info)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_sixteen_bits_are_the_unquantized_cache(model, options):
    expected = generate(model, unquantized_cache(model.config), **options)
    assert torch.equal(generate(model, MixedCache.from_plan(plan_of(model, 16), model.config), **options), expected)


@pytest.mark.slow
def test_sixteen_bits_under_our_attention_are_the_unquantized_cache(model):
    before = model.config._attn_implementation
    model.set_attn_implementation("kvmix")
    expected = generate(model, unquantized_cache(model.config))
    got = generate(model, MixedCache.from_plan(plan_of(model, 16), model.config))
    model.set_attn_implementation(before)
    assert torch.equal(got, expected)


def test_our_attention_predicts_what_the_models_own_does(model):
    """Over more tokens than an indexer chooses: a model applies the choice itself for attentions that it knows only."""
    before = model.config._attn_implementation
    tokens, steps = ids(60), [50, 1, 9]
    expected = teacher_forced(model, unquantized_cache(model.config), tokens, steps)
    model.set_attn_implementation("kvmix")
    got = teacher_forced(model, unquantized_cache(model.config), tokens, steps)
    model.set_attn_implementation(before)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (4, 0.6)])
def test_quantized_logits_are_close(model, bits, tolerance):
    """Random weights spread attention little and amplify errors; a cache that loses tokens is off by more than 1."""
    tokens, steps = ids(70), [60] + [1] * 10
    expected = teacher_forced(model, unquantized_cache(model.config), tokens, steps)
    cache = MixedCache.from_plan(plan_of(model, bits), model.config)
    got = teacher_forced(model, cache, tokens, steps)
    assert (got - expected).norm() <= tolerance * expected.norm()
    assert cache.attended.share > 0


@pytest.mark.parametrize("bits", [2, 4])
def test_predicted_bytes_are_the_ones_allocated(model, bits):
    plan = plan_of(model, bits)
    cache = MixedCache.from_plan(plan, model.config)
    teacher_forced(model, cache, ids(51), [50, 1])
    held = sum(cache.layers[index].nbytes for index in plan.layers)
    assert held == plan.cache_bytes(50, 2, 4).total + plan.unquantized_bytes(1, 2, 4)
    full = unquantized_cache(model.config)
    teacher_forced(model, full, ids(51), [50, 1])
    beside = cache_nbytes(cache) - held
    assert beside == cache_nbytes(full) - plan.unquantized_bytes(51, 2, 4)


def test_a_state_follows_its_sequences(models):
    for name in STATEFUL:
        model = models(name)
        plan = plan_of(model, 16)
        tokens = ids(41)
        swapped = torch.tensor([1, 0])
        caches = MixedCache.from_plan(plan, model.config), unquantized_cache(model.config)
        logits = []
        for cache in caches:
            teacher_forced(model, cache, tokens[:, :40], [40])
            cache.reorder_cache(swapped)
            logits.append(teacher_forced(model, cache, tokens[swapped][:, 40:], [1]))
            cache.reset()
            logits.append(teacher_forced(model, cache, tokens[:, :8], [8]))
        torch.testing.assert_close(logits[0], logits[2])
        torch.testing.assert_close(logits[1], logits[3])


def test_an_indexer_takes_tokens_back_with_its_layer(models):
    model = models("latent, indexed")
    tokens = ids(44)
    cache = MixedCache.from_plan(plan_of(model, 16), model.config)
    assert cache.is_croppable
    teacher_forced(model, cache, tokens[:, :43], [40, 3])
    cache.crop(-3)
    again = teacher_forced(model, cache, tokens[:, 40:], [4])
    expected = teacher_forced(model, unquantized_cache(model.config), tokens, [40, 4])[:, 40:]
    torch.testing.assert_close(again, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latent", "wider values", "heads by layer", "hybrid"])
def test_from_a_profile_to_a_plan_that_runs(name, models):
    model = models(name)
    info = model_info(model.config, "m")
    loaded = LoadedModel(model, ByteTokenizer(), info, None)
    profile = run_profile(loaded, ["grad-norm"], texts=["one two three " * 40], source="text", samples=1, seq_len=64)
    plan = allocate(profile, Budget(avg_bits=3), cache=SETTINGS)
    assert plan.bits.nominal <= 3 + 1e-6
    again = Plan.model_validate(plan.model_dump())
    assert (again, again.sha256) == (plan, plan.sha256)
    assert generate(model, MixedCache.from_plan(plan, model.config)).max() < VOCABULARY


@pytest.mark.slow
def test_latents_are_observed_as_they_are_cached(models):
    model = models("latent")
    loaded = LoadedModel(model, ByteTokenizer(), model_info(model.config, "m"), None)
    model.set_attn_implementation("kvmix")
    text = ["one two three " * 40]
    profile = run_profile(loaded, ["fisher"], texts=text, source="text", samples=1, seq_len=400)
    layers = profile.scores["fisher"].layers
    assert list(layers) == profile.model.quantizable
    assert all(layer.k.mean > 0 and layer.v.mean > 0 for layer in layers.values())


def test_baselines_of_other_libraries_count_keys_and_values_of_different_sizes(models):
    config = models("wider values").config
    assert named_cache("bf16", config, torch.float32, torch.device("cpu")).stored_bits == 16


def test_layers_that_are_not_quantized_are_listed(models):
    info = model_info(models("wider values").config, "m")
    assert layers_text(info) == "quantized 2 of 4 layers; 2 sliding, not quantized"
    assert layers_json(info) == {
        "quantized": 2,
        "total": 4,
        "full_precision": 0,
        "stock": {"sliding_attention": 2},
    }
    mixed = Plan.from_short("0-2:k4v4,3:k16v16", info)
    assert layers_text(info, mixed) == "quantized 1 of 4 layers; 2 sliding, 1 at 16 bits, not quantized"
    assert layers_text(model_info(models("latent").config, "m")) == ""
    assert str(HeadGeometry(kv_heads=1, key_dim=32, value_dim=16)) == "1 x 32 (values 16)"


AXES = {
    "rotated": {"transforms": Transforms(k=(Rotate(),), v=(Rotate(),))},
    "centered": {"transforms": Transforms(k=(Center(),), v=(Center(),))},
    "in tiers": {"tokens": TokenPolicy(score="recency", tiers=(Tier(share=0.5, k=8, v=8),), flush=32)},
}


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", ["latent", "wider values", "heads by layer", "hybrid"])
def test_transforms_and_tiers_of_such_layers(name, axes, models):
    model = models(name)
    plan = plan_of(model, 8, SETTINGS.model_copy(update=AXES[axes]))
    cache = MixedCache.from_plan(plan, model.config)
    tokens, steps = ids(71), [70, 1]
    got = teacher_forced(model, cache, tokens, steps)
    expected = teacher_forced(model, unquantized_cache(model.config), tokens, steps)
    assert (got - expected).norm() <= 0.05 * expected.norm()
    held = sum(cache.layers[index].nbytes for index in plan.layers)
    assert held == plan.cache_bytes(70, 2, 4).total + plan.unquantized_bytes(1, 2, 4)
