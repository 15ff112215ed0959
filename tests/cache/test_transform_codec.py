"""Transform codes in a cache: what a float64 reference says, on every path that tokens can take."""

import warnings

import pytest
import torch
import transformers
from architectures import VOCABULARY, build
from coding import (
    FRAME,
    PAGE,
    SINK,
    coded_and_back,
    coded_plan,
    coded_reference,
    falling_widths,
    made_up_directions,
    settings_with,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.pages import Coded
from kvmix_kernels.runtime.fallback import warn_once
from kvmix_kernels.transform_layout import exact_count
from teaching import PIECES, ids, left_padded, swap_by_beams, takes_back_without_a_trace, teacher_forced
from warned import falls_back_once

from kvmix_cli.cache.coded import CodedLayer
from kvmix_cli.cache.layer import MixedLayer
from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.observation import AttentionCall
from kvmix_cli.errors import PlanError, QuantizationError
from kvmix_cli.plan import LayerPlan, TransformTensor
from kvmix_cli.plan.tensors.basis import BasisFile

ROPE = {"llama": 1 / 10_000 ** (torch.arange(8) / 8), "gpt_neox": 1 / 10_000 ** (torch.arange(2) / 2)}
"""Frequencies of the small models: whole heads of 16, and a quarter of the channels of NeoX's."""


def model_of(family):
    """A small model under our attention."""
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=VOCABULARY, n_layer=3, n_head=4, n_embd=64, n_positions=256)
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0, 0.15)
    else:
        model = build(family)
    model.set_attn_implementation("kvmix")
    return model


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "padding"),
    [("llama", 0), ("llama", 25), ("gpt_neox", 25), ("gemma2", 25), ("gpt2", 25), ("latent", 25)],
)
def test_a_whole_model_sees_what_the_reference_sees(family, padding, tmp_path):
    """Codes are the same, so both differ by sums in another order; of models in float64 that is 1e-9 and less."""
    model = model_of(family)
    plan = coded_plan(model, tmp_path, rope=ROPE.get(family))
    steps = [90, 1, 1, 33, 5, 30]
    tokens = ids(sum(steps))
    mask = left_padded(tokens, padding) if padding else None
    cache = MixedCache.from_plan(plan, model.config)
    got = teacher_forced(model, cache, tokens, steps, mask)
    expected = teacher_forced(model, coded_reference(plan, model.config), tokens, steps, mask)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[0, padding:], expected[0, padding:], rtol=1e-5, atol=1e-5)
    assert cache.attended.share > 0


@pytest.mark.slow
@pytest.mark.parametrize(("k", "v"), [("coded", 16), (16, "coded")])
def test_one_of_both_may_be_in_full_precision(llama, k, v, tmp_path):
    plan = coded_plan(llama, tmp_path, k, v, rope=ROPE["llama"])
    tokens = ids(sum(PIECES["chunks"]))
    both = (MixedCache.from_plan(plan, llama.config), coded_reference(plan, llama.config))
    got, expected = (teacher_forced(llama, cache, tokens, PIECES["chunks"]) for cache in both)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("k", "v", "exact"), [("coded", 4, 1), (4, "coded", 1), ("coded", 16, 2), ("coded", "coded", 2)]
)
def test_a_row_does_not_see_what_is_beside_it(llama, k, v, exact, tmp_path):
    """Products of other batch sizes have other sums, by far less than a code."""
    plan = coded_plan(llama, tmp_path, k, v, exact, ROPE["llama"])
    tokens, steps = ids(150), [90, 1, 1, 40, 18]
    together = teacher_forced(llama, MixedCache.from_plan(plan, llama.config), tokens, steps)
    for row in range(2):
        alone = teacher_forced(llama, MixedCache.from_plan(plan, llama.config), tokens[row : row + 1], steps)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-6, atol=1e-6)


def one_layer(folder, k, v, exact=0, kv_heads=2, dim=32, dtype=torch.float64):
    """A layer of a plan, with a function that gives it tokens and shows it their queries."""
    basis = BasisFile("test", {0: {kind: made_up_directions(kv_heads, dim, n) for n, kind in enumerate("kv")}}, FRAME)
    cache_settings = settings_with(folder, basis, exact)
    layer = (CodedLayer if exact else MixedLayer)(0, LayerPlan(k=k, v=v), cache_settings)

    def feed(keys, values, queries=None):
        layer.update(keys, values)
        if queries is not None and exact:
            layer.observe(AttentionCall(queries, scaling=1.0))

    return layer, feed, basis


def states(count, seed, kv_heads=2, dim=32, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, kv_heads, count, dim, generator=generator, dtype=dtype)


@pytest.mark.slow
@given(
    kv_heads=st.integers(1, 3),
    dim=st.sampled_from([8, 16, 24, 40, 64]),
    seed=st.integers(0, 99),
    exact=st.integers(0, 3),
    chunks=st.lists(st.integers(1, 60), min_size=1, max_size=4),
)
@settings(max_examples=20, deadline=None)
def test_every_layout_is_read_as_it_was_coded(tmp_path_factory, kv_heads, dim, seed, exact, chunks):
    """Whatever the pieces that tokens come in; the exact ones are as they were, whichever they are."""
    widths = {kind: falling_widths(kv_heads, dim, seed + n) for n, kind in enumerate("kv")}
    plans = [TransformTensor(widths=widths[kind]) for kind in "kv"]
    layer, feed, basis = one_layer(tmp_path_factory.mktemp("basis"), *plans, exact, kv_heads, dim)
    total = sum(chunks)
    keys, values = (states(total, seed + n, kv_heads, dim, batch=1) for n in range(2))
    at = 0
    for size in chunks:
        part = slice(at, at + size)
        feed(keys[:, :, part], values[:, :, part], keys[:, :, part])
        at += size
    packed = layer.stores[0].packed_tokens
    for given_, store, kind in zip((keys, values), layer.stores, "kv", strict=True):
        read = store.segments().dequantize()
        rest = [*range(min(SINK, total)), *range(SINK + packed, total)]
        torch.testing.assert_close(read[:, :, rest], given_[:, :, rest], rtol=0, atol=0)
        for head in range(kv_heads):
            kept = places_of(store, head) if packed else []
            assert len(kept) == exact_count(exact, packed // PAGE, PAGE)
            for place in range(packed):
                state = given_[0, head, SINK + place]
                back = coded_and_back(state, basis.layers[0][kind], head, widths[kind][head], kind == "v")
                expected = state if place in kept else back
                torch.testing.assert_close(read[0, head, SINK + place], expected, rtol=1e-6, atol=1e-6)


def places_of(store, head, row=0):
    """Places of the exact tokens of a head among all packed ones."""
    coded = store.segments().packed
    assert isinstance(coded, Coded)
    return [] if coded.places is None else coded.places[row, head].tolist()


CODED = TransformTensor(widths=("2211", "3310"))


@pytest.mark.filterwarnings("ignore:kvmix. the model.s attention does not show")
def test_exact_tokens_are_those_with_the_most_attention_times_error(tmp_path):
    """Token 10 of the first page is looked at by all queries, and the others of it hardly: it is not coded worst."""
    layer, feed, _ = one_layer(tmp_path, CODED, CODED, exact=1)
    keys, values = states(60, 1, batch=1), states(60, 2, batch=1)
    wanted = torch.nn.functional.normalize(keys[:, :, SINK + 10], dim=-1)
    queries = (40 * wanted).unsqueeze(2).expand(-1, -1, 60, -1)
    by_error = one_layer(tmp_path, CODED, CODED, exact=1)[:2]
    by_error[1](keys, values)
    by_error[1](keys[:, :, :1], values[:, :, :1])
    feed(keys, values, queries)
    feed(keys[:, :, :1], values[:, :, :1], queries[:, :, :1])
    for head in range(2):
        chosen = [places_of(store, head) for store in layer.stores]
        assert chosen[0] == chosen[1], "keys and values share their exact tokens"
        assert 10 in chosen[0]
        assert 10 not in places_of(by_error[0].stores[0], head)


def test_without_queries_the_error_decides_and_it_is_said_once(llama, tmp_path):
    """Under another attention, which shows no queries."""
    warn_once.cache_clear()
    plan = coded_plan(llama, tmp_path, exact=1, rope=ROPE["llama"])
    tokens = ids(150)
    llama.set_attn_implementation("sdpa")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            caches = [MixedCache.from_plan(plan, llama.config) for _ in range(2)]
            for cache in caches:
                teacher_forced(llama, cache, tokens, [90, 1, 30, 29])
    finally:
        llama.set_attn_implementation("kvmix")
    said = [str(each.message) for each in caught if "exact tokens" in str(each.message)]
    assert len(said) == 1
    assert "attn_implementation='kvmix'" in said[0]
    assert all(layer.stores[0].packed_tokens for layer in caches[0].layers)


def test_keys_and_values_of_a_prompt_wait_for_its_queries_and_can_be_read(tmp_path):
    layer, feed, _ = one_layer(tmp_path, CODED, CODED, exact=1)
    keys, values = states(100, 1), states(100, 2)
    layer.update(keys, values)
    assert torch.equal(layer.keys.dequantize(), keys)
    assert layer.get_seq_length() == 100
    warn_once.cache_clear()
    with falls_back_once("the model's attention does not show its queries"):
        feed(keys[:, :, :5], values[:, :, :5])
    assert layer.get_seq_length() == 105
    assert layer.stores[0].packed_tokens > 0


@pytest.mark.slow
def test_beams_and_batches(llama, tmp_path):
    plan = coded_plan(llama, tmp_path, exact=1, rope=ROPE["llama"])
    tokens, step = ids(120), ids(6)
    one, other = (MixedCache.from_plan(plan, llama.config) for _ in range(2))
    with torch.no_grad():
        llama(tokens, past_key_values=one)
        swap_by_beams(one)
        for layer in one.layers:
            layer.offload()
            layer.prefetch()
        llama(tokens.flip(0), past_key_values=other)
        for _ in range(10):  # past a page
            logits = [llama(step, past_key_values=cache).logits for cache in (one, other)]
            torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)
    cache = MixedCache.from_plan(plan, llama.config)
    assert llama.generate(tokens, past_key_values=cache, num_beams=3, max_new_tokens=20).shape == (2, 140)


@pytest.mark.slow
@given(
    exact=st.integers(0, 2),
    steps=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=4),
    prompt=st.sampled_from([20, 60, 100]),
)
@settings(max_examples=8, deadline=None)
def test_taking_back_part_of_the_last_forward_leaves_no_trace(tmp_path_factory, exact, steps, prompt):
    model = model_of("llama")
    plan = coded_plan(model, tmp_path_factory.mktemp("basis"), exact=exact, rope=ROPE["llama"])
    rolled_back, straight = (MixedCache.from_plan(plan, model.config) for _ in range(2))
    takes_back_without_a_trace(model, rolled_back, straight, prompt, steps)


@pytest.mark.parametrize("exact", [0, 2])
def test_a_page_that_is_cut_goes_back_to_the_tail_as_it_was_read(exact, tmp_path):
    layer, feed, _ = one_layer(tmp_path, CODED, CODED, exact)
    keys, values = states(150, 1), states(150, 2)
    feed(keys, values, keys)
    before = [store.segments().dequantize() for store in layer.stores]
    assert layer.stores[0].packed_tokens == 64
    layer.crop(-(150 - SINK - 40))
    assert [store.packed_tokens for store in layer.stores] == [32, 32]
    for store, whole in zip(layer.stores, before, strict=True):
        torch.testing.assert_close(store.segments().dequantize(), whole[:, :, : SINK + 40], rtol=1e-12, atol=1e-12)
    feed(keys[:, :, :60], values[:, :, :60], keys[:, :, :60])
    feed(keys[:, :, :1], values[:, :, :1], keys[:, :, :1])
    assert layer.get_seq_length() == SINK + 40 + 61
    assert layer.stores[0].packed_tokens > 32


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named_with_its_layer(bad, tmp_path):
    _, feed, _ = one_layer(tmp_path, CODED, CODED)
    keys, values = states(100, 1), states(100, 2)
    values[0, 0, 10, 3] = bad
    with pytest.raises(QuantizationError, match=r"layer 0 values: NaN or Inf"):
        feed(keys, values)


@pytest.mark.parametrize(
    ("k", "v", "exact"),
    [
        ("coded", "coded", 0),
        ("coded", "coded", 1),
        ("coded", 4, 2),
        (2, "coded", 1),
        (16, "coded", 1),
        ("coded", 16, 0),
    ],
)
def test_predicted_bytes_are_measured_bytes(k, v, exact, tmp_path):
    """All but the attention of one token, the one that is decoded, and that which it gave to exact tokens."""
    model = build("llama", torch.bfloat16)
    model.set_attn_implementation("kvmix")
    plan = coded_plan(model, tmp_path, k, v, exact)
    for context in (70, 201):
        cache = MixedCache.from_plan(plan, model.config)
        with torch.no_grad():
            model(ids(context), past_key_values=cache)
            model(ids(1), past_key_values=cache)
        predicted = plan.cache_bytes(context, batch=2).total + 2 * plan.unquantized_bytes(1)
        given_ = 2 + exact_count(exact, context // PAGE, PAGE)
        statistics = 2 * given_ * 4 * plan.model.kv_heads * len(plan.layers) if exact else 0
        assert predicted <= cache.nbytes <= predicted + statistics


@pytest.mark.slow
def test_room_is_reserved_once(llama, tmp_path):
    plan = coded_plan(llama, tmp_path, exact=1)
    cache = MixedCache.from_plan(plan, llama.config, reserve=200)
    with torch.no_grad():
        llama(ids(120), past_key_values=cache)
        packing = cache.layers[0].stores[0].packing
        before = [buffer.allocated_bytes for buffer in packing.buffers()]
        for _ in range(60):
            llama(ids(1), past_key_values=cache)
    assert [buffer.allocated_bytes for buffer in packing.buffers()] == before


def test_a_cache_filled_in_inference_mode_is_used_outside(llama, tmp_path):
    plan = coded_plan(llama, tmp_path, exact=1, rope=ROPE["llama"])
    cache = MixedCache.from_plan(plan, llama.config)
    with torch.inference_mode():
        llama(ids(120), past_key_values=cache)
        llama(ids(30), past_key_values=cache)
    llama(ids(1), past_key_values=cache).logits.sum().backward()
    llama.zero_grad()
    cache.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        llama(ids(30), past_key_values=cache)


def test_caches_share_the_tensors_of_a_basis(llama, tmp_path):
    plan = coded_plan(llama, tmp_path, exact=1)
    found = []
    for _ in range(2):
        cache = MixedCache.from_plan(plan, llama.config)
        with torch.no_grad():
            llama(ids(120), past_key_values=cache)
        found.append(cache.layers[1].stores[0].packing.view.basis)
    assert found[0] is found[1]


def test_a_missing_basis_or_one_of_other_frames_is_one_line(llama, tmp_path):
    plan = coded_plan(llama, tmp_path)
    transform = plan.cache.transform
    gone = transform.model_copy(update={"basis": str(tmp_path / "gone.safetensors")})
    unframed = transform.model_copy(update={"frame": None})
    for wrong, said in ((gone, r"gone\.safetensors: there is no such file; put"), (unframed, "made for frames of 64")):
        other = plan.model_copy(update={"cache": plan.cache.model_copy(update={"transform": wrong})})
        with pytest.raises(PlanError, match=said) as error:
            MixedCache.from_plan(other, llama.config)
        assert "\n" not in str(error.value)
