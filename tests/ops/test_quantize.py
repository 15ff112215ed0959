"""The naive codec against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.quantize import decode, dequantize, encode, pack, quantize, unpack

KINDS = ("key", "value")
SCALE_ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
SCALE_FLOOR = {"float16": 2.0**-24, "bfloat16": 2.0**-24}

layouts = st.builds(
    PageLayout,
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from(BITS),
    head_dim=st.sampled_from([16, 64, 80, 96, 128]),
    page=st.sampled_from([16, 32, 128]),
    group_size=st.sampled_from([1, 24, 32, 64, 128, None]),
    scale_dtype=st.sampled_from(sorted(SCALE_ROUNDING)),
)


def pages_of(layout: PageLayout, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randn(2, 3, layout.page, layout.head_dim, generator=generator) * spread
    return pages + torch.randn(layout.head_dim, generator=generator) * spread


@given(layout=layouts, seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_shapes_and_bytes_are_what_the_layout_says(layout, seed):
    words, scales = quantize(pages_of(layout, seed), layout)
    assert words.shape == (2, 3, *layout.words_shape)
    assert words.dtype == torch.int16
    assert scales.shape == (2, 3, *layout.scales_shape)
    assert words.nbytes + scales.nbytes == 6 * layout.nbytes


@given(layout=layouts, seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_packing_is_a_bijection_within_the_bits(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, layout.levels + 1, (2, layout.rows, layout.columns), generator=generator)
    unpacked = unpack(pack(codes.to(torch.uint8), layout), layout)
    assert torch.equal(unpacked.long(), codes)
    again = pack(unpacked.to(torch.uint8), layout)
    assert torch.equal(again, pack(codes.to(torch.uint8), layout))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_fields_lie_where_the_layout_draws_them(kind, bits):
    layout = PageLayout(kind, bits, head_dim=32, page=64, group_size=None)
    codes = torch.randint(0, layout.levels + 1, (layout.rows, layout.columns))
    words = pack(codes.to(torch.uint8), layout)
    row_of_word, shift = 0, 0
    for width in layout.planes:
        words_of_plane = layout.rows * width // 16
        for row in range(layout.rows):
            field, word = divmod(row, words_of_plane)
            stored = (words[row_of_word + word].int() >> (field * width)) & (2**width - 1)
            assert torch.equal(stored.long(), (codes[row] >> shift) & (2**width - 1))
        row_of_word, shift = row_of_word + words_of_plane, shift + width


@pytest.mark.slow
@given(layout=layouts, seed=st.integers(0, 2**16), spread=st.sampled_from([1e-42, 1e-6, 1.0, 100.0, 1e4]))
@settings(max_examples=120, deadline=None)
def test_error_is_at_most_half_a_scale(layout, seed, spread):
    pages = pages_of(layout, seed, spread).clamp(-3e4, 3e4)
    matrix = pages.transpose(-1, -2) if layout.kind == "key" else pages
    codes, scales = encode(matrix, layout)
    assert codes.max() <= layout.levels
    spread_out = scales.double().mT.repeat_interleave(layout.group, -1)[..., : layout.columns]
    scale, zero = spread_out.unbind(-3)
    relative, floor = SCALE_ROUNDING[layout.scale_dtype], SCALE_FLOOR[layout.scale_dtype]
    rounding = layout.levels * (scale * relative * 1.001 + floor) + zero.abs() * relative + floor
    error = (decode(codes, scales, layout).double() - matrix.double()).abs()
    assert (error <= scale / 2 * 1.0001 + rounding + matrix.abs() * 1e-6).all()


@pytest.mark.slow
@given(layout=layouts, seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_round_trip_through_words_is_exact(layout, seed):
    pages = pages_of(layout, seed)
    codes, scales = encode(pages.transpose(-1, -2) if layout.kind == "key" else pages, layout)
    expected = decode(codes, scales, layout)
    got = dequantize(*quantize(pages, layout), layout)
    assert torch.equal(got.transpose(-1, -2) if layout.kind == "key" else got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.5, -1e4, 2.0**-30, 1e-42])
def test_constant_groups_come_back_as_their_rounded_value(kind, bits, value):
    layout = PageLayout(kind, bits, head_dim=16, page=32, group_size=16)
    pages = torch.full((32, 16), value)
    got = dequantize(*quantize(pages, layout), layout)
    assert torch.equal(got, pages.half().float())


def test_one_outlier_costs_only_its_group():
    layout = PageLayout("value", 4, head_dim=64, page=16, group_size=32)
    pages = torch.linspace(-1, 1, 16 * 64).view(16, 64)
    pages[3, 5], pages[4, 40] = 1e4, -1e4
    got = dequantize(*quantize(pages, layout), layout)
    untouched = torch.ones(16, 2, dtype=torch.bool)
    untouched[3, 0] = untouched[4, 1] = False
    error = (got - pages).abs().view(16, 2, 32).amax(-1)
    assert (error[untouched] < 0.01).all()
    assert abs(got[3, 5] - 1e4) <= 1e4 / 15


def test_a_group_of_one_element_is_its_rounded_value():
    layout = PageLayout("key", 2, head_dim=16, page=16, group_size=1)
    pages = torch.randn(16, 16)
    assert torch.equal(dequantize(*quantize(pages, layout), layout), pages.half().float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e6])
def test_what_cannot_be_stored_shows_in_the_scales(bad):
    layout = PageLayout("key", 2, head_dim=16, page=16, group_size=None)
    pages = torch.zeros(16, 16)
    pages[3, 7] = bad
    _, scales = quantize(pages, layout)
    assert not torch.isfinite(scales).all()


def test_three_bits_are_three_bits():
    layout = PageLayout("value", 3, head_dim=128, page=128, group_size=32)
    words, _ = quantize(torch.randn(128, 128), layout)
    assert words.nbytes * 8 == 3 * 128 * 128
    assert layout.stored_bits == 4.0


@pytest.mark.parametrize(
    "change",
    [{"kind": "query"}, {"bits": 5}, {"head_dim": 24}, {"page": 0}, {"group_size": 0}, {"scale_dtype": "int8"}],
)
def test_impossible_layouts_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PageLayout(**{"kind": "key", "bits": 2, "head_dim": 64, "page": 32} | change)


def test_wrong_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\[\.\.\., 32, 64\], got \[2, 64, 32\]"):
        quantize(torch.zeros(2, 64, 32), PageLayout("key", 2, head_dim=64, page=32))
