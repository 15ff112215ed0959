"""The native operations on every instruction set: the codec bit for bit like the naive one, attention within 1e-3."""

from dataclasses import replace

import pytest
import torch
from attending import instruction_sets, relative_rms, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.attend import AttentionProblem, attend, cpu, naive
from kvmix_kernels.layout import ENCODERS
from kvmix_kernels.quantize import cpu as quantize_cpu
from kvmix_kernels.quantize import naive as quantize_naive
from kvmix_kernels.quantize import quantize
from kvmix_kernels.runtime.fallback import warn_once
from kvmix_kernels.runtime.native import library
from poisoned import segments
from warned import falls_back_once

layouts = st.builds(
    PageLayout,
    kind=st.sampled_from(["key", "value"]),
    bits=st.sampled_from(BITS),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 576, 640]),
    page=st.sampled_from([16, 32, 128]),
    group_size=st.sampled_from([16, 32, 64, 128, None]),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
)


pytestmark = pytest.mark.skipif(library() is None, reason="there is no native library")


@pytest.mark.slow
@given(
    layout=layouts,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    encoder=st.sampled_from(ENCODERS),
    spread=st.sampled_from([1e-42, 1e-7, 1e-3, 1.0, 1e4]),
    constant=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=120, deadline=None)
def test_quantizes_bit_for_bit_like_the_reference(layout, dtype, encoder, spread, constant, seed):
    torch.manual_seed(seed)
    pages = (torch.randn(2, 2, 3, layout.page, layout.head_dim) * spread).clamp(-3e4, 3e4).to(dtype)
    if constant:
        pages[0, 0, 0] = spread
    expected = quantize_naive.quantize(pages, layout, encoder)
    for name in instruction_sets():
        words, scales = quantize_cpu.quantize(library(), pages, layout, encoder)
        assert torch.equal(words, expected[0]), name
        assert same_bits(scales, expected[1]), name


@given(
    layout=layouts,
    encoder=st.sampled_from(ENCODERS),
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    at=st.integers(0, 2**10),
)
@settings(max_examples=40, deadline=None)
def test_nan_and_inf_reach_the_scales(layout, encoder, bad, at):
    pages = torch.randn(1, 1, 1, layout.page, layout.head_dim)
    pages.view(-1)[at % pages.numel()] = bad
    for name in instruction_sets():
        assert not torch.isfinite(quantize_cpu.quantize(library(), pages, layout, encoder)[1]).all(), name


@pytest.mark.slow
@given(
    bits=st.tuples(st.sampled_from([*BITS, 16]), st.sampled_from([*BITS, 16])),
    head_dim=st.sampled_from([16, 80, 128]),
    page=st.sampled_from([32, 128]),
    group=st.sampled_from([16, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_attends_to_every_shape_of_page(bits, head_dim, page, group, dtype, seed):
    torch.manual_seed(seed)
    shape = {"head_dim": head_dim, "page": page, "group": group, "dtype": dtype}
    key, value = (segments(kind, width, 4, 6, 9, **shape) for kind, width in zip(("key", "value"), bits, strict=True))
    problem = AttentionProblem(torch.randn(2, 6, 2, head_dim), key, value, scaling=head_dim**-0.5)
    expected, _ = naive.attend(replace(problem, query=problem.query.double()))
    for name in instruction_sets():
        got, _ = cpu.attend(library(), problem)
        assert relative_rms(got, expected) < 1e-3, name


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 48), (192, 128), (256, 80), (512, 64), (576, 512), (640, 640)])
@pytest.mark.parametrize("bits", [(2, 4), (16, 3), (8, 1)])
def test_attends_to_keys_and_values_of_any_size_that_16_divides(key_dim, value_dim, bits):
    torch.manual_seed(0)
    dims = {"key": key_dim, "value": value_dim}
    key, value = (
        segments(kind, width, 4, 2, 9, head_dim=dims[kind], page=32) for kind, width in zip(dims, bits, strict=True)
    )
    problem = AttentionProblem(torch.randn(2, 4, 2, key_dim), key, value, scaling=key_dim**-0.5)
    expected, _ = naive.attend(replace(problem, query=problem.query.double()))
    for name in instruction_sets():
        got, _ = cpu.attend(library(), problem)
        assert relative_rms(got, expected) < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_takes_queries_of_any_dtype_and_strides_and_returns_their_dtype(dtype):
    torch.manual_seed(0)
    key, value = (segments(kind, 4, 4, 2, 9, head_dim=64, page=32) for kind in ("key", "value"))
    problem = AttentionProblem(torch.randn(2, 3, 4, 64, dtype=dtype).transpose(1, 2), key, value, scaling=0.125)
    plain = replace(problem, query=problem.query.float().contiguous())
    for name in instruction_sets():
        got, logarithms = cpu.attend(library(), problem)
        expected, sums = cpu.attend(library(), plain)
        assert got.dtype == dtype, name
        assert same_bits(got, expected.to(dtype)), name
        assert same_bits(logarithms, sums), name
    apart = replace(problem, query=torch.empty(*problem.query.shape, 2, dtype=dtype)[..., 0].copy_(problem.query))
    assert same_bits(cpu.attend(library(), apart)[0], got)


def test_any_number_of_threads_gives_the_same():
    torch.manual_seed(0)
    key, value = (segments(kind, 3, 4, 99, 9, batch=1, heads=1) for kind in ("key", "value"))
    pages = torch.randn(1, 3, 50, 16, 32)
    layout = PageLayout("key", 3, 32, 16, 16)
    problem = AttentionProblem(torch.randn(1, 3, 1, 32), key, value, scaling=0.2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((attend(problem)[0], *quantize_cpu.quantize(library(), pages, layout)))
    finally:
        torch.set_num_threads(before)
    for attended, words, scales in results[1:]:
        assert relative_rms(attended, results[0][0].double()) < 1e-3  # coefficients are rounded to 16 bits
        assert torch.equal(words, results[0][1])
        assert same_bits(scales, results[0][2])


def test_groups_that_vectors_do_not_divide_fall_back_with_one_warning():
    warn_once.cache_clear()
    with falls_back_once("quantizing groups of 8 has no CPU kernel"):
        quantize(torch.randn(1, 1, 1, 16, 32), PageLayout("key", 4, 32, 16, 8))
    key, value = (segments(kind, 4, 0, 3, 5, group=8) for kind in ("key", "value"))
    problem = AttentionProblem(torch.randn(2, 2, 1, 32), key, value, scaling=1.0)
    with pytest.warns(UserWarning, match=r"heads of 32 in groups of \[8\] has no CPU kernel"):
        got, _ = attend(problem)
    torch.testing.assert_close(got, naive.attend(problem)[0])
