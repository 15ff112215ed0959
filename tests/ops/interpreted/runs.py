"""The attention kernels over keys whose channels are sorted and cut into runs, against dense float64 attention."""

from dataclasses import replace

import pytest
import torch
from attending import GPU_RMS, like_the_definition, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.attend import AttentionProblem
from kvmix_kernels.attend.triton import attend, unsupported
from kvmix_kernels.segments import Segments
from poisoned import channels, mask_of, segments, splits_of
from reference import dense_attention

RUNS = [
    ((64, 4),),
    ((16, 16), (32, 4), (16, 2)),
    ((48, 3), (16, 8)),
    ((32, 1), (32, 16)),
    ((16, 16), (16, 4), (16, 2), (16, 1)),
    ((16, 8), (80, 2)),
]


def case(runs, pages, v_pages, queries, dtype, group, pages_per_order, sinks=3, page=64):
    """Queries, keys and values of as many tokens."""
    head_dim, tail = sum(width for width, _ in runs), queries + 20
    states = torch.randn(2, 1, pages * page, head_dim).to(dtype)
    ends = segments("key", 2, sinks, 0, tail + page * max(0, v_pages - pages), head_dim, page, group, dtype, heads=1)
    key = Segments(ends.sink, channels(runs, states, page, group, pages_per_order), ends.tail)
    v_tail = key.shape[2] - sinks - v_pages * page
    value = segments("value", 4, sinks, v_pages, v_tail, head_dim, page, group, dtype, heads=1)
    return torch.randn(2, 2, queries, head_dim).to(dtype), key, value


@given(
    runs=st.sampled_from(RUNS),
    pages=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    queries=st.sampled_from([1, 2, 3]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    group=st.sampled_from([32, 64]),
    pages_per_order=st.sampled_from([1, 2, 100]),
    sinks=st.sampled_from([0, 3]),
    masking=st.sampled_from([None, "bool", "additive"]),
    softcap=st.sampled_from([None, 1.5]),
    logits=st.booleans(),
    split=st.sampled_from([64, 1024]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=6, deadline=None)
def test_equals_dense_attention(
    runs, pages, queries, dtype, group, pages_per_order, sinks, masking, softcap, logits, split, seed
):
    torch.manual_seed(seed)
    query, key, value = case(runs, *pages, queries, dtype, group, pages_per_order, sinks)
    tokens = key.shape[2]
    options = (
        query.shape[3] ** -0.5,
        mask_of(masking, queries, tokens, seed % tokens),
        softcap,
        torch.randn(2) if logits else None,
    )
    problem = AttentionProblem(query, key, value, *options)
    assert unsupported(problem) is None
    plain = [each.read(0, tokens, torch.float32) for each in (key, value)]
    with splits_of(split):
        got, logarithms = attend(problem)
    assert relative_rms(got, dense_attention(query, *plain, *options)) < GPU_RMS
    like_the_definition(problem, got, logarithms)


@pytest.mark.parametrize("runs", RUNS, ids=str)
def test_every_cut(runs):
    torch.manual_seed(0)
    query, key, value = case(runs, 2, 2, 1, torch.bfloat16, 64, 1)
    plain = [each.read(0, key.shape[2], torch.float32) for each in (key, value)]
    got, _ = attend(AttentionProblem(query, key, value, scaling=0.125))
    assert relative_rms(got, dense_attention(query, *plain, 0.125)) < GPU_RMS


def test_what_has_no_kernel_is_named():
    query, key, value = case(((16, 4),) * 5, 1, 1, 1, torch.float32, 64, 1)
    assert "keys in 5 runs of channels" in unsupported(AttentionProblem(query, key, value, 1.0))
    query, key, value = case(((32, 4), (32, 2)), 1, 1, 1, torch.float32, 64, 1)
    assert "values in runs of channels" in unsupported(AttentionProblem(query, key, key, 1.0))
    mixed = channels(((32, 4),), torch.randn(2, 1, 64, 32), 64, 32).runs
    key = replace(key, packed=replace(key.packed, runs=(key.packed.runs[0], *mixed)))
    assert "groups of 32 and 64" in unsupported(AttentionProblem(query, key, value, 1.0))
