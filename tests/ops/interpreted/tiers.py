"""The attention kernels over tokens in tiers, against the definition in float64."""

from dataclasses import replace

import torch
from attending import like_the_definition
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem
from kvmix_kernels.attend.triton import attend, unsupported
from poisoned import channels, in_a_poisoned_buffer, mask_of, packed, segments_in_tiers, splits_of, tiers

PAGE, GROUP, HEAD_DIM = 64, 32, 64


def hold(kind, bits, count, dtype):
    """The tokens of a tier; keys of 0 bits are in runs of channels."""
    states = torch.randn(2, 1, count, HEAD_DIM).to(dtype)
    if bits == 16:
        return in_a_poisoned_buffer(states)
    if bits == 0:
        return channels(((16, 16), (48, 2)), states, PAGE, GROUP)
    return packed(states, PageLayout(kind, bits, HEAD_DIM, PAGE, GROUP))


def case(widths, counts, gone, sinks, tail, dtype):
    """Keys and values with as many tokens in tiers of `(K bits, V bits)`."""
    tier = tiers(counts, gone)
    held = [
        [hold(kind, bits[side], count, dtype) for bits, count in zip(widths, counts, strict=True)]
        for side, kind in enumerate(("key", "value"))
    ]
    return [segments_in_tiers(tier, each, sinks, tail, HEAD_DIM, dtype) for each in held]


@given(
    widths=st.sampled_from([((2, 2), (16, 16)), ((4, 16), (0, 2)), ((2, 3), (8, 4), (16, 16)), ((1, 1),)]),
    pages=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    gone=st.sampled_from([0, 5, 40]),
    sinks=st.sampled_from([0, 3]),
    tail=st.sampled_from([0, 1, 30]),
    queries=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    masking=st.sampled_from([None, "bool", "additive"]),
    softcap=st.sampled_from([None, 1.5]),
    logits=st.booleans(),
    split=st.sampled_from([64, 1024]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=8, deadline=None)
def test_equals_the_definition(widths, pages, gone, sinks, tail, queries, dtype, masking, softcap, logits, split, seed):
    torch.manual_seed(seed)
    counts = [seed % 50 if bits == (16, 16) else PAGE * count for bits, count in zip(widths, pages, strict=False)]
    key, value = case(widths, counts, gone, sinks, tail and queries + tail, dtype)
    tokens = key.shape[2]
    if tokens < queries or key.kept_tokens == 0:
        return
    query = torch.randn(2, 3, queries, HEAD_DIM).to(dtype)
    mask, sink_logits = mask_of(masking, queries, tokens, seed % tokens), torch.randn(3) if logits else None
    problem = AttentionProblem(query, key, value, HEAD_DIM**-0.5, mask, softcap, sink_logits)
    assert unsupported(problem) is None
    with splits_of(split):
        got, logarithms = attend(problem)
    like_the_definition(problem, got, logarithms)


def test_a_row_that_sees_nothing_of_any_tier_is_zero():
    key, value = case(((2, 2), (16, 16)), (64, 7), 3, 3, 5, torch.float32)
    mask = torch.zeros(2, 1, 1, key.shape[2], dtype=torch.bool)
    output, logarithms = attend(AttentionProblem(torch.randn(2, 2, 1, HEAD_DIM), key, value, 1.0, mask))
    assert (output == 0).all()
    assert (logarithms == -torch.inf).all()


def test_a_tier_that_no_kernel_takes_is_named():
    key, value = case(((16, 16),), (48,), 0, 0, 5, torch.float32)
    odd = PageLayout("key", 2, HEAD_DIM, 48)
    key = replace(key, packed=replace(key.packed, held=(packed(torch.randn(2, 1, 48, HEAD_DIM), odd),)))
    assert "pages of 48 tokens" in unsupported(AttentionProblem(torch.randn(2, 2, 1, HEAD_DIM), key, value, 1.0))
