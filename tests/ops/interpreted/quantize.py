"""The quantizing kernel against the naive codec, bit for bit."""

import pytest
import torch
from attending import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.layout import ENCODERS
from kvmix_kernels.quantize import naive, triton

layouts = st.builds(
    PageLayout,
    kind=st.sampled_from(["key", "value"]),
    bits=st.sampled_from(BITS),
    head_dim=st.sampled_from([64, 80, 96, 128, 256]),
    page=st.sampled_from([16, 48, 64, 128]),
    group_size=st.sampled_from([24, 32, 64, 128, None]),
    scale_dtype=st.sampled_from(["float16", "bfloat16"]),
)


@given(
    layout=layouts,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    encoder=st.sampled_from(ENCODERS),
    spread=st.sampled_from([1e-42, 1e-7, 1e-3, 1.0, 1e4]),
    by_channel=st.booleans(),
    constant=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=24, deadline=None)
def test_same_words_and_scales(layout, dtype, encoder, spread, by_channel, constant, seed):
    torch.manual_seed(seed)
    pages = (torch.randn(2, 1, 1, layout.page, layout.head_dim) * spread).clamp(-3e4, 3e4).to(dtype)
    if constant:
        pages[0, 0, 0] = spread
    if by_channel:
        pages = pages.mT.contiguous().mT
    words, scales = triton.quantize(pages, layout, encoder)
    expected = naive.quantize(pages, layout, encoder)
    assert same_bits(words, expected[0])
    assert same_bits(scales, expected[1])


@given(
    layout=layouts,
    encoder=st.sampled_from(ENCODERS),
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e38]),
    at=st.integers(0, 2**10),
)
@settings(max_examples=9, deadline=None)
def test_what_cannot_be_stored_shows_in_the_same_scales(layout, encoder, bad, at):
    pages = torch.randn(1, 1, 1, layout.page, layout.head_dim)
    pages.view(-1)[at % pages.numel()] = bad
    words, scales = triton.quantize(pages, layout, encoder)
    expected = naive.quantize(pages, layout, encoder)
    torch.testing.assert_close(scales, expected[1], rtol=0, atol=0, equal_nan=True)
    finite = torch.isfinite(scales.float()).all(dim=-3).all(dim=-2)  # rows of the matrix that lost nothing
    codes, meant = (naive.unpack(each, layout)[finite] for each in (words, expected[0]))
    assert torch.equal(codes, meant)


@pytest.mark.parametrize("kind", ["key", "value"])
def test_writes_into_a_longer_cache_and_only_there(kind):
    layout = PageLayout(kind, 3, 80, 64, 32)
    pages = torch.randn(2, 3, 5, 64, 80)[:, ::2, 1:3]
    words = torch.full((2, 2, 7, *layout.words_shape), 12345, dtype=torch.int16)
    scales = torch.full((2, 2, 7, *layout.scales_shape), 12345.0, dtype=torch.float16)
    triton.quantize_into(pages, layout, words[:, :, 4:6], scales[:, :, 4:6])
    expected = naive.quantize(pages, layout)
    assert torch.equal(words[:, :, 4:6], expected[0])
    assert torch.equal(scales[:, :, 4:6], expected[1])
    for buffer in (words, scales):
        assert (buffer[:, :, [0, 1, 2, 3, 6]] == 12345).all()
