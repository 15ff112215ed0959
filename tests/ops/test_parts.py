"""Keys in channel runs and tokens in tiers: read back, and attended to like one dense float64 softmax over them all."""

import pytest
import torch
from attending import dense, in_tiers, paths, seen
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.attend import AttentionProblem, attend, naive
from kvmix_kernels.pages import Channels, Packed, Plain
from kvmix_kernels.quantize import quantize
from kvmix_kernels.runtime.fallback import warn_once
from kvmix_kernels.runtime.native import library
from kvmix_kernels.segments import Segments
from kvmix_kernels.sorted_tokens import EVICTED, Tiers
from poisoned import channel_runs, packed_pages, pooled, segments
from reference import dense_attention_lse
from warned import falls_back_once

OUTPUT = {"naive": 1e-5}
LOGARITHM = {"naive": 1e-5}
NATIVE = 1e-3
"""Relative RMS of outputs, absolute of logarithms; see test_attend."""

any_bits = st.sampled_from([*BITS, 16])
runs = st.lists(st.tuples(st.sampled_from([16, 32, 48]), any_bits), min_size=1, max_size=4)
calls = st.fixed_dictionaries(
    {
        "queries": st.sampled_from([1, 2, 5]),
        "ratio": st.sampled_from([1, 2, 4]),
        "masking": st.sampled_from([None, "bool", "additive", "same for all tokens", "added to all tokens"]),
        "softcap": st.sampled_from([None, 1.5]),
        "logits": st.booleans(),
    }
)
shapes = st.fixed_dictionaries(
    {"page": st.sampled_from([16, 32, 128]), "group": st.sampled_from([16, 32, 64, None])},
)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def mask_of(masking, queries, tokens, heads):
    if masking is None:
        return None
    if masking == "same for all tokens":
        return torch.rand(2, 1, queries, 1) > 0.3
    if masking == "added to all tokens":
        return torch.randn(2, heads, 1, 1)
    mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries).expand(2, heads, -1, -1).clone()
    mask &= torch.rand(mask.shape) > 0.2
    mask[0, ..., : tokens // 3] = False  # left padding
    return mask if masking == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def assert_dense(key, value, *, queries, ratio, masking, softcap, logits):
    """Every path against float64."""
    query = torch.randn(2, 2 * ratio, queries, key.shape[3])
    mask = mask_of(masking, queries, key.shape[2], query.shape[1])
    sinks = torch.randn(query.shape[1]) if logits else None
    scaling = key.shape[3] ** -0.5
    expected, expected_log = dense_attention_lse(
        query, dense(key), dense(value), scaling, seen(query, key, mask), softcap, sinks
    )
    for name, path in paths():
        got, log = path(AttentionProblem(query, key, value, scaling, mask, softcap, sinks))
        error = (got - expected).pow(2).mean().sqrt()
        assert error <= OUTPUT.get(name, NATIVE) * expected.pow(2).mean().sqrt(), name
        bound = LOGARITHM.get(name, NATIVE)
        assert torch.allclose(log.double(), expected_log, rtol=bound, atol=bound), name


@pytest.mark.slow
@given(
    runs=runs,
    v_bits=any_bits,
    pages=st.integers(1, 7),
    pages_per_order=st.sampled_from([1, 3, 100]),
    sinks=st.sampled_from([0, 3]),
    shape=shapes,
    dtype=dtypes,
    call=calls,
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_keys_in_channel_runs(runs, v_bits, pages, pages_per_order, sinks, shape, dtype, call, seed):
    torch.manual_seed(seed)
    widths, bits = zip(*runs, strict=True)
    channels, tail = sum(widths), call["queries"] + seed % 5
    keys = channel_runs(widths, bits, pages, pages_per_order, dtype=dtype, **shape)
    sink, end = (torch.randn(2, 2, n, channels, dtype=dtype) for n in (sinks, tail))
    key = Segments(sink if sinks else None, keys, end)
    value = segments("value", v_bits, sinks, pages, tail, 48, dtype=dtype, **shape)
    assert_dense(key, value, **call)


@pytest.mark.slow
@given(
    bits=st.tuples(any_bits, any_bits),
    first=st.integers(0, 6),
    sinks=st.sampled_from([0, 3]),
    shape=shapes,
    dtype=dtypes,
    call=calls,
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_another_number_of_tokens_in_each_head(bits, first, sinks, shape, dtype, call, seed):
    torch.manual_seed(seed)
    forms = [
        (None if each == 16 else PageLayout(kind, each, width, shape["page"], shape["group"]), width)
        for kind, each, width in zip(("key", "value"), bits, (32, 48), strict=True)
    ]
    key, value = pooled(torch.tensor([[first, 6 - first], [3, 3]]), forms, shape["page"], dtype)
    ends = [[torch.randn(2, 2, n, width, dtype=dtype) for n in (sinks, 5 + seed % 5)] for _, width in forms]
    keys, values = (
        Segments(sink if sinks else None, packed, tail) for packed, (sink, tail) in zip((key, value), ends, strict=True)
    )
    assert_dense(keys, values, **call)


tiers = st.lists(
    st.one_of(
        st.tuples(st.just("pages"), any_bits.filter(lambda b: b < 16), any_bits.filter(lambda b: b < 16)),
        st.tuples(st.just("runs"), any_bits, any_bits.filter(lambda b: b < 16)),
        st.tuples(st.just("full")),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@given(
    tiers=tiers,
    sizes=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    gone=st.sampled_from([0, 1, 20]),
    sinks=st.sampled_from([0, 3]),
    has_tail=st.booleans(),
    log_weight=st.sampled_from([0.0, 0.0, 1.7]),
    shape=shapes,
    dtype=dtypes,
    call=calls,
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_tokens_in_tiers(tiers, sizes, gone, sinks, has_tail, log_weight, shape, dtype, call, seed):
    torch.manual_seed(seed)
    keys, values = [], []
    for (kind, *bits), size in zip(tiers, sizes, strict=False):
        if kind == "full":
            keys.append(torch.randn(2, 2, 7 * size, 48, dtype=dtype))
            values.append(torch.randn(2, 2, 7 * size, 32, dtype=dtype))
            continue
        keys.append(
            packed_pages("key", bits[0], size, 48, **shape)
            if kind == "pages"
            else channel_runs([16, 32], [bits[0], 2], size, 2, dtype=dtype, **shape)
        )
        values.append(packed_pages("value", bits[1], size, 32, **shape))
    tail = call["queries"] + seed % 5 if has_tail else 0
    packed = in_tiers(keys, values, gone, log_weight)
    key, value = (
        Segments(torch.randn(2, 2, sinks, width) if sinks else None, tiers, torch.randn(2, 2, tail, width))
        for tiers, width in zip(packed, (48, 32), strict=True)
    )
    if not has_tail and call["masking"] is None:
        call = {**call, "queries": 1}  # without a mask, the queries' own tokens are in the tail
    if key.shape[2] >= call["queries"]:
        assert_dense(key, value, **call)


def test_a_tier_that_alone_has_tokens_is_all_there_is():
    torch.manual_seed(0)
    keys, values = (packed_pages(kind, 4, 3) for kind in ("key", "value"))
    nothing = torch.randn(2, 2, 0, 32)
    packed = in_tiers([nothing, keys], [nothing, values])
    query = torch.randn(2, 2, 1, 32)
    for name, path in paths():
        got = path(AttentionProblem(query, *(Segments(None, tiers, nothing) for tiers in packed), scaling=0.2))
        whole = (Segments(None, keys, nothing), Segments(None, values, nothing))
        expected = path(AttentionProblem(query, *whole, scaling=0.2))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, msg=name)


def test_tokens_that_are_all_gone_give_zero():
    packed = in_tiers(*[[torch.randn(2, 2, 0, 32)]] * 2, gone=9)
    key, value = (Segments(None, tiers, torch.randn(2, 2, 0, 32)) for tiers in packed)
    for name, path in paths():
        output, logarithm = path(AttentionProblem(torch.randn(2, 2, 1, 32), key, value, scaling=1.0))
        assert (output == 0).all(), name
        assert (logarithm == -torch.inf).all(), name


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_gives_the_same(threads):
    torch.manual_seed(0)
    keys = [channel_runs([16, 16], [4, 2], 70), packed_pages("key", 8, 40), torch.randn(2, 2, 9, 32)]
    values = [packed_pages("value", 2, 70), packed_pages("value", 8, 40), torch.randn(2, 2, 9, 32)]
    key, value = (Segments(None, tiers, torch.randn(2, 2, 5, 32)) for tiers in in_tiers(keys, values, 3))
    query, before = torch.randn(2, 6, 2, 32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = attend(AttentionProblem(query, key, value, scaling=0.2))
        torch.set_num_threads(threads)
        got = attend(AttentionProblem(query, key, value, scaling=0.2))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@given(
    bits=st.sampled_from(BITS),
    widths=st.lists(st.sampled_from([16, 32, 48]), min_size=1, max_size=4),
    pages=st.integers(1, 5),
    pages_per_order=st.sampled_from([1, 2, 100]),
    edges=st.tuples(st.integers(0, 80), st.integers(0, 80)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_runs_of_one_width_read_as_if_they_were_one(bits, widths, pages, pages_per_order, edges, seed):
    torch.manual_seed(seed)
    states = torch.randn(2, 2, pages, 16, sum(widths))
    layout = PageLayout("key", bits, sum(widths), 16)
    whole = Packed(layout, *quantize(states, layout))
    order = torch.rand(2, 2, -(-pages // pages_per_order), sum(widths)).argsort(dim=-1)
    of_page = order.repeat_interleave(pages_per_order, dim=2)[:, :, :pages, None].expand_as(states)
    cut = []
    for part in states.gather(-1, of_page).split(widths, dim=-1):
        narrow = PageLayout("key", bits, part.shape[-1], 16)
        cut.append(Packed(narrow, *quantize(part, narrow)))
    channels = Channels(order.to(torch.uint8), pages_per_order, tuple(cut))
    start, stop = sorted(min(edge, 16 * pages) for edge in edges)
    assert channels.tokens == whole.tokens == 16 * pages
    assert channels.width == sum(widths)
    assert torch.equal(channels.read(start, stop, torch.float32), whole.read(start, stop, torch.float32))


def test_plain_runs_give_back_what_they_got():
    torch.manual_seed(0)
    states = torch.randn(2, 2, 3, 16, 40, dtype=torch.bfloat16)
    order = torch.rand(2, 2, 3, 40).argsort(dim=-1)
    places = states.gather(-1, order[:, :, :, None].expand_as(states)).transpose(-1, -2)
    runs = tuple(Plain(part.contiguous()) for part in places.split([8, 32], dim=3))
    got = Channels(order.to(torch.uint8), 1, runs).read(5, 40, torch.bfloat16)
    assert torch.equal(got, states.flatten(2, 3)[:, :, 5:40])


@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4), gone=st.integers(0, 9), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_tiers_give_back_what_they_got_where_it_was(sizes, gone, seed):
    torch.manual_seed(seed)
    tokens = sum(sizes) + gone
    states, held = torch.randn(2, 3, tokens, 8), [torch.randn(2, 3, n, 8) for n in sizes]
    tiers, _ = in_tiers(held, held, gone)
    held = []
    for tier, size in enumerate(sizes):
        places = tiers.places(tier)
        assert places.shape == (2, 3, size)
        assert (tiers.tier.gather(2, places) == tier).all()
        assert (places.diff(dim=-1) > 0).all()
        held.append(states.gather(2, places[..., None].expand(-1, -1, -1, 8)))
    tiers = Tiers(tiers.tier, tuple(held))
    assert (tiers.tokens, tiers.kept, tiers.quantized) == (tokens, tokens - gone, 0)
    assert tiers.places(EVICTED).shape == (2, 3, gone)
    if gone:
        with pytest.raises(ValueError, match=f"{gone} of {tokens} tokens have been evicted"):
            tiers.read(0, tokens, torch.float32)
    else:
        assert torch.equal(tiers.read(tokens // 3, tokens, torch.float32), states[:, :, tokens // 3 :])


def test_a_tier_holds_pages_of_any_kind():
    torch.manual_seed(0)
    keys = [packed_pages("key", 4, 2), channel_runs([16, 16], [16, 2], 1), torch.randn(2, 2, 5, 32)]
    tiers, _ = in_tiers(keys, keys)
    whole = tiers.read(0, 53, torch.float32)
    assert tiers.quantized == 48
    for tier, held in enumerate(keys):
        states = held if tier == 2 else held.read(0, held.tokens, torch.float32)
        assert torch.equal(whole.gather(2, tiers.places(tier)[..., None].expand_as(states)), states)


def test_a_problem_has_keys_and_values_in_the_same_tiers():
    states = [torch.randn(2, 2, n, 32) for n in (4, 8)]
    key, value = (Segments(None, tiers, states[0]) for tiers in in_tiers(states, states))
    query = torch.randn(2, 2, 1, 32)
    plain = Segments(None, None, torch.randn(2, 2, 16, 32))
    shifted = Segments(states[0][:, :, :1], value.packed, states[0][:, :, 1:])
    assert shifted.shape == plain.shape == key.shape
    for pair in [(key, plain), (plain, value), (key, shifted)]:
        with pytest.raises(ValueError, match="keys and values are not in the same tiers"):
            AttentionProblem(query, *pair, scaling=1.0)


@pytest.mark.skipif(library() is None, reason="there is no native library")
@pytest.mark.parametrize(
    ("keys", "values", "named"),
    [
        ({}, {"widths": [16, 16], "bits": [4, 2]}, "values in channel runs"),
        ({"widths": [16, 16], "bits": [4, 2], "group": 8}, {"bits": 4}, r"groups of \[8, 16\]"),
        ({}, {"pages": 1, "page": 32}, r"pages of \[16, 32\]"),
    ],
)
@pytest.mark.parametrize("tiered", [False, True])
def test_what_has_no_native_path_is_named_once(keys, values, named, tiered):
    warn_once.cache_clear()
    packed = [
        (channel_runs if "widths" in shape else packed_pages)(**{"kind": kind, "bits": 4, "pages": 2, **shape})
        for kind, shape in (("key", keys), ("value", values))
    ]
    if tiered:
        packed = in_tiers(packed[:1], packed[1:])
    key, value = (Segments(None, pages, torch.randn(2, 2, 3, 32)) for pages in packed)
    problem = AttentionProblem(torch.randn(2, 2, 1, 32), key, value, scaling=0.2)
    with falls_back_once(f"{named}.* has no CPU kernel"):
        got, _ = attend(problem)
    torch.testing.assert_close(got, naive.attend(problem)[0])
