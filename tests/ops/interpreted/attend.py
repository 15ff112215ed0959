"""The attention kernels against one dense float64 softmax over the dequantized tokens."""

import pytest
import torch
from attending import GPU_RMS, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.attend import AttentionProblem
from kvmix_kernels.attend.triton import attend, unsupported
from kvmix_kernels.pages import Packed
from kvmix_kernels.quantize.naive import quantize
from kvmix_kernels.segments import Segments
from poisoned import mask_of, segments, splits_of
from reference import dense_attention

widths = st.sampled_from([*BITS, 16])


@given(
    k_bits=widths,
    v_bits=widths,
    sinks=st.sampled_from([0, 3]),
    pages=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    page=st.sampled_from([16, 32, 64, 128]),
    group=st.sampled_from([32, 64, 128, None]),
    dims=st.sampled_from([(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (96, 64)]),
    rows=st.sampled_from([(1, 1), (1, 3), (1, 16), (2, 4), (7, 3), (7, 4), (16, 1), (16, 3)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
    masking=st.sampled_from([None, "bool", "additive"]),
    softcap=st.sampled_from([None, 1.5]),
    logits=st.booleans(),
    split=st.sampled_from([64, 1024]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=9, deadline=None)
def test_equals_dense_attention(
    k_bits, v_bits, sinks, pages, page, group, dims, rows, dtype, scale_dtype, masking, softcap, logits, split, seed,
):  # fmt: skip
    torch.manual_seed(seed)
    queries, ratio = rows
    tokens = sinks + page * max(pages) + queries + seed % 70
    k_tail, v_tail = (tokens - sinks - page * count for count in pages)
    key = segments("key", k_bits, sinks, pages[0], k_tail, dims[0], page, group, dtype, scale_dtype, heads=1)
    value = segments("value", v_bits, sinks, pages[1], v_tail, dims[1], page, group, dtype, scale_dtype, heads=1)
    query = torch.randn(2, queries, ratio, dims[0]).to(dtype).transpose(1, 2)
    options = (
        dims[0] ** -0.5,
        mask_of(masking, queries, tokens, seed % tokens),
        softcap,
        torch.randn(ratio) if logits else None,
    )
    problem = AttentionProblem(query, key, value, *options)
    assert unsupported(problem) is None
    plain = [each.read(0, tokens, torch.float32) for each in (key, value)]
    with splits_of(split):
        got, _ = attend(problem)
    assert got.dtype == dtype
    assert relative_rms(got, dense_attention(query, *plain, *options)) < GPU_RMS


def test_rows_that_the_lowest_number_masks_are_even_means_over_splits_of_different_lengths():
    torch.manual_seed(0)
    key, value = (
        segments(kind, bits, 3, pages, 39 - 16 * pages + 16, 64, 16, 64, torch.bfloat16, heads=1)
        for kind, bits, pages in (("key", 2, 2), ("value", 2, 2))
    )
    query, lowest = torch.randn(2, 1, 3, 64), torch.finfo(torch.float32).min
    mask = torch.full((2, 1, 3, key.shape[2]), lowest)
    mask[1] = 0
    with splits_of(16):
        got, _ = attend(AttentionProblem(query, key, value, 0.125, mask))
    even = value.read(0, value.shape[2], torch.float32)[:1].double().mean(2, keepdim=True)
    assert relative_rms(got[:1], even.expand(1, 1, 3, 64)) < GPU_RMS


@pytest.mark.parametrize(
    ("page", "k_bits", "v_bits"), [(16, 1, 3), (16, 16, 2), (32, 3, 1), (32, 8, 4), (32, 2, 8), (32, 4, 16)]
)
def test_pages_that_do_not_fill_a_step_are_contracted_together(page, k_bits, v_bits):
    torch.manual_seed(0)
    k_pages, v_pages = 0 if k_bits == 16 else 7, 0 if v_bits == 16 else 6
    tokens = 3 + 7 * page + 9
    key, value = (
        segments(kind, bits, 3, pages, tokens - 3 - pages * page, 64, page, 64, torch.bfloat16, batch=1, heads=1)
        for kind, bits, pages in (("key", k_bits, k_pages), ("value", v_bits, v_pages))
    )
    problem = AttentionProblem(torch.randn(1, 2, 2, 64).bfloat16(), key, value, scaling=0.125)
    assert unsupported(problem) is None
    plain = [each.read(0, tokens, torch.float32) for each in (key, value)]
    with splits_of(5 * page):
        got, _ = attend(problem)
    assert relative_rms(got, dense_attention(problem.query, *plain, 0.125)) < GPU_RMS


@pytest.mark.parametrize("bits", [2, 16])
def test_a_row_that_sees_nothing_is_zero(bits):
    key, value = (segments(kind, bits, 0, 1, 5, 64, 64, None, torch.float32, heads=1) for kind in ("key", "value"))
    mask = torch.zeros(2, 1, 1, key.shape[2], dtype=torch.bool)
    for each in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        problem = AttentionProblem(torch.randn(2, 2, 1, 64), key, value, scaling=1.0, mask=each)
        assert (attend(problem)[0] == 0).all()


def test_outliers_do_not_hide_the_rest():
    torch.manual_seed(0)
    states = torch.randn(1, 1, 128, 64)
    states[..., 5] *= 1e3
    layouts = PageLayout("key", 4, 64, 64), PageLayout("value", 4, 64, 64)
    key, value = (
        Segments(None, Packed(layout, *quantize(states.unflatten(2, (-1, 64)), layout)), torch.zeros(1, 1, 1, 64))
        for layout in layouts
    )
    query = torch.randn(1, 1, 1, 64)
    query[..., 5] *= 1e-3
    plain = [each.dequantize() for each in (key, value)]
    got, _ = attend(AttentionProblem(query, key, value, scaling=0.125))
    assert relative_rms(got, dense_attention(query, *plain, 0.125)) < GPU_RMS


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"page": 48}, "pages of 48 tokens"),
        ({"group": 24}, "keys in groups of 24"),
        ({"group": 8}, "keys in groups of 8"),
        ({"dtype": torch.float64}, "float32 queries over float64 keys"),
        ({"head_dim": 512}, "heads of 512"),
    ],
)
def test_what_has_no_kernel_is_named(change, complaint):
    shape = {"head_dim": 64, "page": 64, "group": 32, "dtype": torch.float32} | change
    key, value = (segments(kind, 2, 0, 1, 5, heads=1, **shape) for kind in ("key", "value"))
    query = torch.randn(2, 2, 1, shape["head_dim"])
    assert complaint in unsupported(AttentionProblem(query, key, value, scaling=1.0))
