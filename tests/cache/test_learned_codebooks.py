"""Vector codes by learned codebooks: against definitions in float64, and caches that store pages so."""

import numpy as np
import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from learned_books import codecs_with, made_up_codebooks
from teaching import ids, teacher_forced

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.codecs import CODECS
from kvmix_cli.codecs.clustering import STEPS, clustered, nearest
from kvmix_cli.codecs.vectors import LEARNED_BITS, SPANS
from kvmix_cli.errors import CacheError, PlanError
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.tensors.codebooks import Codebooks
from kvmix_cli.plan.windows import Recent

PAGE, SINK, WINDOW = 16, 4, 10
ROPE = 1 / 10_000 ** (np.arange(16) / 16)
"""Frequencies of the model's keys, whose heads have 32 channels."""
TEXT = ids(150, batch=1)


@pytest.fixture(scope="module")
def llama():
    model = build("llama", torch.float32, wide=True)
    model.set_attn_implementation("kvmix")
    return model


def plan_of(model, folder, k=2, v=2, rope=ROPE, seed=0):
    info = model_info(model.config, "test")
    codecs = codecs_with(folder / f"books-{seed}.safetensors", made_up_codebooks(info, rope, seed=seed))
    cache = CacheSettings(page=PAGE, sink=SINK, window=Recent(tokens=WINDOW), codecs=codecs)
    return Plan.uniform(info, k, v, cache)


def filled(model, plan, steps=(149, 1)):
    cache = MixedCache.from_plan(plan, model.config)
    return cache, teacher_forced(model, cache, TEXT, list(steps))


def codec_with_books(bits, head_dim=32, heads=3, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    span = SPANS[bits]
    books = torch.randn(heads, head_dim // span, 1 << bits * span, span, generator=drawn)
    return CODECS["vectors"].learned()("key", bits, head_dim, PAGE, books=books)


def coded(states, books):
    """Return states `[H, T, D]` with each group of channels replaced by the nearest entry of its codebook, float64."""
    states, books = states.double(), books.double()
    found = torch.empty_like(states)
    span = books.shape[3]
    for head, of_head in enumerate(books):
        for group, book in enumerate(of_head):
            part = slice(group * span, (group + 1) * span)
            distances = (states[head, :, None, part] - book).square().sum(-1)
            found[head, :, part] = book[distances.argmin(-1)]
    return found


def turned(keys, positions):
    """Return keys `[H, T, D]` turned by RoPE, pair by pair as complex numbers, float64."""
    pairs = torch.complex(*keys.double().chunk(2, dim=-1))
    angles = torch.outer(positions.double(), torch.from_numpy(ROPE))
    moved = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([moved.real, moved.imag], dim=-1)


@settings(deadline=None, max_examples=8)
@given(bits=st.sampled_from(LEARNED_BITS), pages=st.integers(1, 3), seed=st.integers(0, 99))
def test_codes_are_the_nearest_entries_of_each_group(bits, pages, seed):
    codec = codec_with_books(bits, seed=seed)
    states = torch.randn(2, 3, pages, PAGE, 32, generator=torch.Generator().manual_seed(seed + 1))
    parts = codec.encode(states)
    assert {name: part.nbytes for name, part in parts.items()} == {"codes": 6 * pages * codec.nbytes}
    assert codec.stored_bits == bits
    for row in range(2):
        expected = coded(states[row].flatten(1, 2), codec.books)
        torch.testing.assert_close(codec.decode(parts)[row].flatten(1, 2).double(), expected, rtol=0, atol=1e-6)


def lloyd(vectors, weights, book):
    """Lloyd's algorithm by its definition, one vector after the other, in float64."""
    for _ in range(STEPS):
        codes = [((book - vector) ** 2).sum(1).argmin() for vector in vectors]
        for entry in range(len(book)):
            mine = [place for place, code in enumerate(codes) if code == entry and weights[place] > 0]
            if mine:
                book[entry] = np.average(vectors[mine], axis=0, weights=weights[mine])
    return book


def test_clusters_are_those_of_the_algorithm_and_weights_draw_them():
    drawn = torch.Generator().manual_seed(0)
    vectors, weights = torch.randn(2, 60, 3, generator=drawn), torch.rand(2, 60, generator=drawn)
    weights[:, :20] = 0
    found = clustered(vectors, weights, 8)
    chances = weights.double().clamp(min=torch.finfo(torch.float32).tiny)
    first = torch.multinomial(chances, 8, generator=torch.Generator().manual_seed(0))
    for cloud in range(2):
        own = vectors[cloud].double().numpy()
        expected = lloyd(own, weights[cloud].double().numpy(), own[first[cloud]].copy())
        np.testing.assert_allclose(found[cloud], expected, atol=1e-5)
    errors = (vectors - found.gather(1, nearest(vectors, found)[..., None].expand(-1, -1, 3))).square().sum(-1)
    assert errors[:, 20:].mean() < 0.8 * errors[:, :20].mean()


def test_keys_are_coded_as_they_are_before_rope_and_values_as_they_are(llama, tmp_path):
    plan = plan_of(llama, tmp_path)
    cache, _ = filled(llama, plan)
    plain, _ = filled(llama, Plan.uniform(plan.model, 16, 16))
    books = Codebooks.load(tmp_path / "books-0.safetensors", plan.cache.codecs.sha256).layers[0]
    for kind, store, exact in zip("kv", cache.layers[0].stores, plain.layers[0].stores, strict=True):
        packed = store.packed_tokens
        states = exact.segments().dequantize()[:, :, SINK : SINK + packed]
        places = torch.arange(SINK, SINK + packed)
        book = torch.from_numpy(books[kind][2])
        found = store.packing.view.read(0, packed, torch.float32)[0]
        before = turned(states[0], -places) if kind == "k" else states[0]
        expected = coded(before, book)
        expected = turned(expected, places) if kind == "k" else expected
        assert packed >= 5 * PAGE
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("k", "v"), [(1, 4), (3, 2), (16, 1)])
def test_predicted_bytes_are_measured_bytes(llama, tmp_path, k, v):
    plan = plan_of(llama, tmp_path, k, v)
    assert plan.bits.stored == plan.bits.nominal == (k + v) / 2
    cache, logits = filled(llama, plan)
    assert plan.cache_bytes(149, element_bytes=4).total + plan.unquantized_bytes(1, element_bytes=4) == cache.nbytes
    assert logits.isfinite().all()


def test_what_is_taken_back_and_told_again_is_what_was(llama, tmp_path):
    plan = plan_of(llama, tmp_path)
    cache, _ = filled(llama, plan)
    before = cache.layers[0].stores[0].segments().dequantize()
    cache.crop(-40)
    again = cache.layers[0].stores[0].segments().dequantize()
    torch.testing.assert_close(again, before[:, :, :-40], rtol=0, atol=1e-5)


def test_a_cache_file_is_read_with_the_codebooks_it_was_made_with(llama, tmp_path):
    plan = plan_of(llama, tmp_path)
    cache, _ = filled(llama, plan)
    path = tmp_path / "cache.safetensors"
    cache.save(path, TEXT, llama)
    loaded = MixedCache.load(path, plan, llama)
    for one, other in zip(cache.layers[0].stores, loaded.layers[0].stores, strict=True):
        assert torch.equal(one.segments().dequantize(), other.segments().dequantize())
    with pytest.raises(CacheError):
        MixedCache.load(path, plan_of(llama, tmp_path, seed=1), llama)


def test_codebooks_of_another_model_are_one_line(llama, tmp_path):
    info = model_info(llama.config, "test")
    other = info.model_copy(update={"kv_heads": 2 * info.kv_heads})
    codecs = codecs_with(tmp_path / "other.safetensors", made_up_codebooks(other))
    plan = Plan.uniform(info, 2, 2, CacheSettings(page=PAGE, codecs=codecs, window=Recent(tokens=WINDOW)))
    with pytest.raises(
        PlanError, match=r"with codebooks of 4 x 32 for layer 0 k, which is 2 x 32; use the file"
    ) as error:
        filled(llama, plan)
    assert "\n" not in str(error.value)
