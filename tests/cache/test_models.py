"""MixedCache inside real models of ten families, against the reference cache in float64."""

from itertools import product

import pytest
import torch
from architectures import CONFIGS, build, case, implementations, reference_implementation
from reference import reference_cache
from teaching import PIECES, ids, swap_by_beams, teacher_forced

from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TensorPlan
from kvmix_cli.plan.windows import NoWindow, Recent, Rpc

MIXED = [(2, 4), (16, 3), (1, 8), (4, 16)]
SETTINGS = {
    "recent": CacheSettings(page=16, sink=4, group_size=16, window=Recent(tokens=10)),
    "rpc": CacheSettings(page=32, sink=0, group_size=32, window=Rpc()),
    "none": CacheSettings(page=16, sink=0, group_size="row", scale_dtype="bfloat16", window=NoWindow()),
}


def plan_for(model, settings="recent", widths=None) -> Plan:
    info = model_info(model.config, "test")
    layers = {}
    for position, index in enumerate(info.quantizable):
        k, v = widths or MIXED[position % len(MIXED)]
        layers[index] = LayerPlan(k=TensorPlan(bits=k), v=TensorPlan(bits=v))
    return Plan.build(info, layers, SETTINGS[settings])


def cases():
    """Families, settings and pieces: all of them for one family, all pairs of two for the others."""
    for row, (family, (column, settings)) in enumerate(product(CONFIGS, enumerate(SETTINGS))):
        for place, pieces in enumerate(PIECES):
            if family == "llama" or place == (row // len(SETTINGS) + column) % len(PIECES):
                yield case(family, settings, pieces)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "settings", "pieces"), list(cases()))
def test_every_family_equals_the_reference(family, settings, pieces):
    """Eager attention has a reference of its own, and is here Llama's alone: `test_left_padding` has all families'."""
    model = build(family)
    plan = plan_for(model, settings)
    steps = PIECES[pieces]
    tokens = ids(sum(steps))
    expected = {}
    for implementation in implementations(family)[0 if family == "llama" else -2 :]:
        reference = reference_implementation(family, implementation)
        if reference not in expected:
            model.set_attn_implementation(reference)
            expected[reference] = teacher_forced(model, reference_cache(plan, model.config), tokens, steps)
        model.set_attn_implementation(implementation)
        cache = MixedCache.from_plan(plan, model.config)
        got = teacher_forced(model, cache, tokens, steps)
        torch.testing.assert_close(got, expected[reference], rtol=1e-6, atol=1e-6)
        assert cache.attended.share > 0


@pytest.mark.parametrize("family", [case(family) for family in CONFIGS])
def test_left_padding(family):
    model = build(family)
    plan = plan_for(model)
    steps = [60] + [1] * 8  # of which the third packs a page
    tokens = ids(sum(steps))
    mask = torch.ones_like(tokens)
    mask[0, :25] = 0
    for implementation in implementations(family):
        # eager attention in float64 makes NaN of fully masked rows, whatever the cache: its softmax is in float32
        model.to(torch.float32 if implementation == "eager" else torch.float64)
        model.set_attn_implementation(reference_implementation(family, implementation))
        expected = teacher_forced(model, reference_cache(plan, model.config), tokens, steps, mask)
        model.set_attn_implementation(implementation)
        got = teacher_forced(model, MixedCache.from_plan(plan, model.config), tokens, steps, mask)
        torch.testing.assert_close(got[0, 25:], expected[0, 25:], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)


def generate(model, cache, prompt, **options):
    options = {"max_new_tokens": 24, "do_sample": False} | options
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)


GENERATIONS = [
    {},
    {"num_beams": 3},
    {"do_sample": True, "temperature": 0.8},
    {"prefill_chunk_size": 16},
    {"max_new_tokens": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", options) for options in GENERATIONS]
    + [(family, options) for family in ("gemma2", "falcon", "gpt_oss") for options in GENERATIONS[:2]],
    ids=str,
)
def test_generation_at_16_bits_is_the_stock_cache(family, options):
    model = build(family, torch.float32)
    plan = plan_for(model, widths=(16, 16))
    prompt = ids(50)
    torch.manual_seed(0)
    expected = generate(model, unquantized_cache(model.config), prompt, **options)
    torch.manual_seed(0)
    got = generate(model, MixedCache.from_plan(plan, model.config), prompt, **options)
    assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "falcon"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}], ids=str)
def test_generation_through_packed_pages_equals_the_reference(family, options):
    model = build(family)
    plan = plan_for(model)
    prompt = ids(50)
    expected = generate(model, reference_cache(plan, model.config), prompt, **options)
    for implementation in implementations(family):
        model.set_attn_implementation(implementation)
        got = generate(model, MixedCache.from_plan(plan, model.config), prompt, **options)
        assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("assisted", ["prompt lookup", "assistant"])
def test_speculative_decoding_at_16_bits_is_the_stock_cache_and_runs_quantized(assisted):
    model = build("llama")  # float64: products of one and of several tokens differ by rounding, which must not decide
    helper = (
        {"prompt_lookup_num_tokens": 3} if assisted == "prompt lookup" else {"assistant_model": build("llama", seed=1)}
    )
    prompt = ids(1, batch=1).repeat(1, 60)
    expected = generate(model, unquantized_cache(model.config), prompt)
    exact = MixedCache.from_plan(plan_for(model, widths=(16, 16)), model.config)
    assert torch.equal(generate(model, exact, prompt, **helper), expected)
    cache = MixedCache.from_plan(plan_for(model, widths=(8, 8)), model.config)
    assert generate(model, cache, prompt, **helper).shape == expected.shape
    assert cache.attended.share > 0
    assert cache.is_croppable


@pytest.mark.slow
def test_a_conversation_goes_on_in_the_same_cache():
    model = build("llama")
    model.set_attn_implementation("kvmix")
    plan = plan_for(model)
    caches = MixedCache.from_plan(plan, model.config), reference_cache(plan, model.config)
    histories = []
    for cache in caches:
        history = generate(model, cache, ids(40, batch=1))
        history = torch.cat([history, ids(30, batch=1, seed=1)], dim=1)
        histories.append(generate(model, cache, history))
    assert torch.equal(*histories)


def test_batch_operations_equal_a_batch_made_so():
    model = build("llama")
    model.set_attn_implementation("kvmix")
    plan = plan_for(model)
    tokens = ids(80, batch=2)
    one, other = (MixedCache.from_plan(plan, model.config) for _ in range(2))
    model(tokens, past_key_values=one)
    swap_by_beams(one)
    model(tokens.flip(0), past_key_values=other)
    step = ids(1)
    torch.testing.assert_close(model(step, past_key_values=one).logits, model(step, past_key_values=other).logits)


def test_crop_and_reset_start_again():
    model = build("llama")
    model.set_attn_implementation("kvmix")
    plan = plan_for(model)
    cache = MixedCache.from_plan(plan, model.config)
    with torch.no_grad():
        first = model(ids(80), past_key_values=cache).logits
        model(ids(9), past_key_values=cache)
        cache.crop(-9)
        assert cache.get_seq_length() == 80
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.nbytes == 0
        torch.testing.assert_close(model(ids(80), past_key_values=cache).logits, first)
    with pytest.raises(ValueError, match="minus the number"):
        cache.crop(3)


def test_layers_may_lie_on_several_devices_and_be_offloaded():
    model = build("llama")
    plan = plan_for(model)
    cache = MixedCache.from_plan(plan, model.config)
    model(ids(80), past_key_values=cache)
    before = [store.segments().dequantize() for layer in cache.layers for store in layer.stores]
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    after = [store.segments().dequantize() for layer in cache.layers for store in layer.stores]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_gradient_is_kept():
    model = build("llama")
    cache = MixedCache.from_plan(plan_for(model), model.config)
    model(ids(80), past_key_values=cache)
    assert not any(store.segments().tail.requires_grad for layer in cache.layers for store in layer.stores)
