"""The encoders that fit a grid to its codes, against least squares in float64 and against what they promise."""

import pytest
import torch
from attending import instruction_sets, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.quantize import cpu, decode, dequantize, encode, naive, quantize
from kvmix_kernels.quantize.grids import CLIPS, SEARCH_STEPS, grid_of, tree_sum
from kvmix_kernels.runtime.native import library

FITTED = ("refit", "search")
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
FLOAT32 = 1e-5
"""Relative room for squared errors that are computed in float32, of numbers with a large common part."""

groups = st.tuples(
    st.sampled_from(BITS),
    st.sampled_from([2, 16, 24, 128]),
    st.sampled_from([0.1, 1.0, 100.0]),
    st.sampled_from([0.0, 3.0]),
    st.booleans(),
    st.integers(0, 2**16),
)


def random_groups(length, spread, offset, is_heavy_tailed, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(64, length, generator=generator)
    return ((numbers**3 if is_heavy_tailed else numbers) + offset) * spread


def codes64(x, scale, zero, levels):
    return torch.where(scale > 0, (x - zero) / scale, 0.0).round().clamp(0, levels)


def error64(x, scale, zero, levels):
    return (codes64(x, scale, zero, levels) * scale + zero - x).square().sum(-1, keepdim=True)


def line64(x, codes):
    """Slope and intercept of the least-squares line of `x` over `codes`; a slope of 0 where codes are constant."""
    mean_x, mean_codes = x.mean(-1, keepdim=True), codes.mean(-1, keepdim=True)
    spread = (codes - mean_codes).square().sum(-1, keepdim=True)
    covariance = ((codes - mean_codes) * (x - mean_x)).sum(-1, keepdim=True)
    slope = torch.where(spread > 0, covariance / spread, 0.0)
    return slope, mean_x - slope * mean_codes


@given(groups)
@settings(max_examples=80, deadline=None)
def test_refit_is_the_least_squares_line_for_the_codes_of_min_and_max(case):
    bits, *shape = case
    x, levels = random_groups(*shape), 2**bits - 1
    minmax = grid_of(x, levels, torch.float16)
    found = grid_of(x, levels, torch.float16, "refit")
    codes = minmax.codes(x, levels).double()  # near a tie float64 may choose the other one
    slope, intercept = line64(x.double(), codes)
    kept = slope <= 2.0**-24
    slope = torch.where(kept, minmax.scale.double(), slope)
    intercept = torch.where(kept, minmax.zero.double(), intercept)
    room = ROUNDING["float16"] + FLOAT32
    size = x.double().abs().amax(-1, keepdim=True)
    assert ((found.scale - slope).abs() <= slope * room + 2.0**-24 + size * 1e-6).all()
    # The intercept belongs to the rounded slope, which turns the line about its middle. It may lie outside the group.
    moved = (found.scale - slope).abs() * codes.mean(-1, keepdim=True)
    largest = torch.maximum(size, intercept.abs())
    assert ((found.zero - intercept).abs() <= moved + largest * room + 2.0**-24).all()


@pytest.mark.slow
@given(groups)
@settings(max_examples=60, deadline=None)
def test_search_finds_what_the_same_search_in_float64_finds(case):
    bits, *shape = case
    x, levels = random_groups(*shape), 2**bits - 1
    found = grid_of(x, levels, torch.float16, "search")
    exact = x.double()
    low, high = exact.aminmax(dim=-1, keepdim=True)
    least = torch.full_like(low, torch.inf)
    for share, below in CLIPS:
        scale, zero = (high - low) * share / levels, low + (high - low) * below
        for step in range(SEARCH_STEPS + 1):
            if step:
                scale, zero = line64(exact, codes64(exact, scale, zero, levels))
            scale, zero = scale.half().double(), zero.half().double()
            least = torch.minimum(least, error64(exact, scale, zero, levels))
    error = error64(exact, found.scale.double(), found.zero.double(), levels)
    # A tie that falls the other way in one group may end in another grid; all groups together hardly change.
    assert error.sum() <= 1.05 * least.sum() + 1e-12 * exact.square().sum()


@pytest.mark.slow
@given(groups, st.sampled_from(sorted(ROUNDING)))
@settings(max_examples=80, deadline=None)
def test_search_is_never_worse_than_min_and_max(case, dtype):
    bits, *shape = case
    x, levels = random_groups(*shape), 2**bits - 1
    before, after = (
        error64(x.double(), grid.scale.double(), grid.zero.double(), levels)
        for grid in (grid_of(x, levels, getattr(torch, dtype), encoder) for encoder in ("minmax", "search"))
    )
    assert (after <= before * (1 + 1e-3) + 1e-12 * x.double().square().sum(-1, keepdim=True)).all()


@pytest.mark.parametrize(
    ("encoder", "bits", "expected"),
    [
        ("minmax", 1, 3.58),
        ("refit", 1, 0.365),
        ("search", 1, 0.359),
        ("minmax", 2, 0.252),
        ("refit", 2, 0.158),
        ("search", 2, 0.115),
        ("minmax", 4, 0.00998),
        ("refit", 4, 0.00957),
        ("search", 4, 0.00895),
    ],
)
def test_errors_of_gaussian_groups_of_128_are_those_measured(encoder, bits, expected):
    layout = PageLayout("value", bits, head_dim=128, page=128)
    pages = torch.randn(1, 8, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    variance = (dequantize(*quantize(pages, layout, encoder), layout) - pages).square().mean().item()
    assert variance == pytest.approx(expected, rel=0.03)  # 4096 groups


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("encoder", FITTED)
def test_words_are_the_codes_of_the_stored_grid(kind, encoder):
    layout = PageLayout(kind, 3, head_dim=80, page=48, group_size=32)
    pages = torch.randn(2, 3, 4, 48, 80)
    codes, scales = encode(pages.mT if kind == "key" else pages, layout, encoder)
    expected = decode(codes, scales, layout)
    words, stored = naive.quantize(pages, layout, encoder)
    assert torch.equal(stored, scales)
    assert torch.equal(dequantize(words, stored, layout), expected.mT if kind == "key" else expected)


@pytest.mark.parametrize("encoder", FITTED)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -1e4, 2.0**-30, 1e-42])
def test_constant_groups_keep_min_and_max(encoder, value):
    layout = PageLayout("value", 2, head_dim=32, page=16, group_size=16)
    pages = torch.full((1, 1, 1, 16, 32), value)
    for one, other in zip(quantize(pages, layout, encoder), naive.quantize(pages, layout), strict=True):
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize("encoder", FITTED)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e6, 1e38])
def test_what_cannot_be_stored_shows_in_the_scales(encoder, bad):
    layout = PageLayout("key", 2, head_dim=32, page=16)
    pages = torch.randn(1, 1, 1, 16, 32)
    pages[..., 3, 7] = bad
    _, scales = naive.quantize(pages, layout, encoder)
    for name in ("naive", *(instruction_sets() if library() is not None else ())):
        got = scales if name == "naive" else cpu.quantize(library(), pages, layout, encoder)[1]
        finite = torch.isfinite(got).all(-3).all(-2).squeeze()
        assert (~finite).nonzero().flatten().tolist() == [7], name
        assert same_bits(got[..., finite], scales[..., finite]), name


@pytest.mark.parametrize("length", [1, 2, 3, 16, 100, 128])
def test_the_tree_adds_everything(length):
    x = torch.arange(3 * length, dtype=torch.float32).view(3, length)
    assert torch.equal(tree_sum(x), x.sum(-1, keepdim=True))


def test_an_unknown_encoder_is_refused():
    with pytest.raises(ValueError, match="encoder must be minmax, refit or search, got 'maxmin'"):
        naive.quantize(torch.zeros(16, 16), PageLayout("key", 2, 16, 16), "maxmin")
