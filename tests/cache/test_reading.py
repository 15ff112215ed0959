"""What reads transformers' caches reads ours: keys and values of a layer, iteration, copies, batch operations.

In ten families, with pages in play, under kvmix and under the families' own attention; at 16 bits everything is the
stock cache's, at 8 bits nearly so.
"""

import copy
import io

import numpy as np
import pytest
import torch
from architectures import CONFIGS, NO_KVMIX_ATTENTION, NO_SDPA, build, reference_implementation
from composing import AXES, plan_for, quantized
from teaching import ids

from kvmix_cli.cache.handle import Handle
from kvmix_cli.cache.layer import MixedLayer
from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.cache.store import ROLLBACK
from kvmix_cli.errors import CacheError, PolicyError

CLOSE = {16: 1e-9, 8: 0.05}
"""Norm of the error relative to the norm of the numbers. At 16 bits only the order of sums in float64 products
differs; at 8 bits a code is off by up to 1/510 of a group's range, and later layers see the error of earlier ones."""
PROMPT, STEPS = 40 + ROLLBACK, 3
CASES = [
    (family, implementation)
    for family in CONFIGS
    for implementation in ("own", "kvmix")
    if not (implementation == "kvmix" and family in NO_KVMIX_ATTENTION)
]


def filled(family, implementation, bits, axes=None, wide=False):
    """Return a model with the stock cache and ours, filled alike: pages are packed before the last steps."""
    model = build(family, wide=wide)
    used = implementation if implementation == "kvmix" else "eager" if family in NO_SDPA else "sdpa"
    caches = (
        unquantized_cache(model.config),
        MixedCache.from_plan(plan_for(model, axes or {}, bits, bits), model.config),
    )
    tokens = ids(PROMPT + STEPS)
    for cache, attention in zip(caches, (reference_implementation(family, used), used), strict=True):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            model(tokens[:, :PROMPT], past_key_values=cache)
            for step in range(PROMPT, PROMPT + STEPS):
                model(tokens[:, step : step + 1], past_key_values=cache)
    return model, *caches


def assert_same(ours, stock, bits):
    """Compare two caches layer by layer, shapes first."""
    assert len(ours) == len(stock)
    for index, ((keys, values, *_), (stock_keys, stock_values, *_)) in enumerate(zip(ours, stock, strict=True)):
        for read, want in ((keys, stock_keys), (values, stock_values)):
            assert (read.shape, read.dtype, read.device) == (want.shape, want.dtype, want.device)
            assert (read - want).norm() <= CLOSE[bits] * want.norm()
        assert ours[index][0].shape == stock_keys.shape
        assert ours.layers[index].values.shape == stock_values.shape
        assert ours.get_seq_length(index) == stock.get_seq_length(index)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("family", "implementation"), CASES)
def test_every_family_can_be_read_and_changed_as_the_stock_cache(family, implementation, bits):
    _, stock, ours = filled(family, implementation, bits)
    quantized_layers = [layer for layer in ours.layers if isinstance(layer, MixedLayer)]
    assert quantized_layers
    assert all((store.packed_tokens > 0) == (bits == 8) for layer in quantized_layers for store in layer.stores)
    assert_same(ours, stock, bits)
    assert_same(copy.deepcopy(ours), stock, bits)
    changes = [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.batch_select_indices(torch.tensor([5, 0, 2])),
    ]
    if all(layer.is_croppable and not layer.is_sliding for layer in stock.layers):
        changes += [lambda cache: cache.crop(-2), lambda cache: cache.crop(-PROMPT // 2)]
    for change in changes:
        change(ours)
        change(stock)
        assert_same(ours, stock, bits)
    ours.reset()
    assert all(layer.keys is None and layer.values is None for layer in quantized_layers)
    assert (ours.get_seq_length(), ours.attended.total) == (0, 0)


@pytest.mark.parametrize("axes", AXES)
def test_transformed_keys_read_as_the_models_own(axes):
    _, stock, ours = filled("llama", "kvmix", 16, AXES[axes], wide=True)
    assert_same(ours, stock, 16)
    assert_same(copy.deepcopy(ours), stock, 16)


@pytest.mark.parametrize("implementation", ["sdpa", "kvmix"])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generation_returns_a_cache_of_the_expected_shape_and_goes_on_from_it(implementation, bits, options):
    """As transformers' generation tests check `past_key_values` and continue from it."""
    model = build("llama")
    model.set_attn_implementation(implementation)
    prompt = ids(PROMPT)
    plan = plan_for(model, {}, bits, bits)

    def generate(cache, tokens, new):
        mask = torch.ones_like(tokens)
        return model.generate(
            tokens,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=new,
            return_dict_in_generate=True,
            **options,
        )

    torch.manual_seed(0)
    result = generate(MixedCache.from_plan(plan, model.config), prompt, 6)
    cache, rows = result.past_key_values, result.sequences.shape[0] * options.get("num_beams", 1)
    assert isinstance(cache, MixedCache)
    assert cache.get_seq_length() == PROMPT + 5
    assert all(layer.keys.shape == layer.values.shape == (rows, 2, PROMPT + 5, 16) for layer in cache.layers)
    if not options:
        resumed = generate(cache, result.sequences, 4).sequences
        assert torch.equal(resumed, generate(MixedCache.from_plan(plan, model.config), prompt, 10).sequences)


def test_shape_dtype_and_device_cost_nothing(monkeypatch):
    _, _, ours = filled("llama", "kvmix", 8)
    monkeypatch.setattr(Handle, "dequantize", lambda self: pytest.fail("dequantized"))
    keys = ours.layers[0].keys
    assert (keys.shape, keys.dtype, keys.device.type) == ((2, 2, PROMPT + STEPS, 16), torch.float64, "cpu")
    assert (keys.numel(), keys.dim(), keys.is_contiguous()) == (2 * 2 * (PROMPT + STEPS) * 16, 4, True)


def test_keys_can_be_copied_saved_and_converted():
    _, _, ours = filled("llama", "kvmix", 8)
    keys = ours.layers[0].keys
    plain = keys.clone()
    file = io.BytesIO()
    torch.save(keys, file)
    file.seek(0)
    for same in (copy.deepcopy(keys), copy.copy(keys), torch.load(file), torch.from_numpy(np.asarray(keys))):
        assert type(same) is torch.Tensor
        assert torch.equal(same, plain)
    assert keys.tolist() == plain.tolist()
    assert keys.numpy().shape == plain.shape


@pytest.mark.parametrize("bits", [16, 8])
def test_what_was_read_stays_when_the_cache_goes_on(bits):
    """A copy keeps its numbers; keys that were read, but not touched, say so instead of giving other numbers."""
    model, _, ours = filled("llama", "kvmix", bits)
    touched, untouched = ours.layers[0].keys, ours.layers[0].keys
    before, sliced = touched.clone(), touched[:, :, -5:]
    with torch.no_grad():
        ours.crop(-2)
        model(ids(2, seed=7), past_key_values=ours)
    assert torch.equal(touched.clone(), before)
    assert torch.equal(sliced, before[:, :, -5:])
    with pytest.raises(CacheError, match=r"changed since; read `cache\.layers\[i\]\.keys`"):
        untouched.clone()


@pytest.mark.parametrize("bits", [16, 8])
def test_nothing_can_be_written_through_keys_and_values(bits):
    _, _, ours = filled("llama", "kvmix", bits)
    layer = ours.layers[0]
    before = layer.keys.clone()
    index = torch.tensor([0])
    for write in (
        lambda: layer.keys.zero_(),
        lambda: layer.keys.__setitem__((index, index, index), 1.0),
        lambda: layer.keys.__setitem__(slice(0, 1), 1.0),
        lambda: torch.add(before, 1, out=layer.keys),
        lambda: setattr(layer, "keys", before),
        lambda: setattr(layer, "values", before),
    ):
        with pytest.raises(CacheError, match=r"cannot be (changed in place|assigned)"):
            write()
    assert torch.equal(layer.keys.clone(), before)


def test_layers_are_read_before_anything_is_stored():
    model = build("llama")
    cache = MixedCache.from_plan(plan_for(model, {}, 8, 8), model.config)
    assert [pair for pair in cache if pair != (None, None, None)] == []
    assert cache[3] == (None, None)
    cache.early_initialization(2, 2, 16, torch.float64, torch.device("cpu"))
    assert cache.layers[0].keys.numel() == 0
    with torch.no_grad():
        model(ids(8), past_key_values=cache)
    assert cache[3][0].shape == (2, 2, 8, 16)


def test_a_waiting_prompt_can_be_read_and_follows_its_batch():
    """Under an attention that shows no queries, a plan that needs them keeps the prompt as it is."""
    model = build("llama")
    model.set_attn_implementation("sdpa")
    cache, stock = (
        MixedCache.from_plan(plan_for(model, AXES["attention"], 2, 2), model.config),
        unquantized_cache(model.config),
    )
    with torch.no_grad():
        for each in (cache, stock):
            model(ids(30), past_key_values=each)
            each.reorder_cache(torch.tensor([1, 0]))
    assert_same(cache, stock, 16)


def test_evicted_tokens_have_a_shape_and_no_numbers():
    from kvmix_cli.plan.tokens import TokenPolicy

    _, _, ours = filled("llama", "kvmix", 8, {"tokens": TokenPolicy(evict=0.5, flush=32)})
    assert ours.layers[0].keys.shape == (2, 2, PROMPT + STEPS, 16)
    with pytest.raises(PolicyError, match="tokens have been evicted"):
        ours.layers[0].keys.clone()


@pytest.mark.parametrize("axes", ["attention", "everything"])
def test_a_copy_goes_on_by_itself(axes):
    model, _, ours = filled("llama", "kvmix", 2, quantized(axes), wide=True)
    model.set_attn_implementation("kvmix")
    untouched = filled("llama", "kvmix", 2, quantized(axes), wide=True)[2]
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for tokens in (ids(50, seed=6), ids(50, seed=6)):
            model(tokens, past_key_values=ours)
        for tokens in (ids(70, seed=4), ids(70, seed=5), ids(1, seed=5)):  # past a flush
            got = [model(tokens, past_key_values=cache).logits for cache in (twin, untouched)]
            torch.testing.assert_close(*got)
