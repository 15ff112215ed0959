"""Transform codes on every instruction set: encoding like the definition, attention within 1e-3 of float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from attending import instruction_sets, relative_rms
from coded_pages import coded, coded_segments, random_basis, random_places, random_widths
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kvmix_kernels.attend import AttentionProblem, attend, cpu, naive
from kvmix_kernels.runtime.fallback import warn_once
from kvmix_kernels.runtime.native import library
from kvmix_kernels.segments import Segments
from kvmix_kernels.transform import cpu as transform_cpu
from kvmix_kernels.transform import encode
from kvmix_kernels.transform import naive as transform_naive
from poisoned import mask_of, segments

pytestmark = pytest.mark.skipif(library() is None, reason="there is no native library")

RMS = 1e-3
"""Coefficients are rounded to 16 bits of the largest, which moves a result by some 1e-4 (kernels/README.md)."""
LOGARITHM = 1e-3
"""Absolute; scores of a few units are off by as much as their coefficients."""


@given(
    kind=st.sampled_from(["key", "value"]),
    head_dim=st.sampled_from([16, 20, 64, 72, 80, 128]),
    page=st.sampled_from([16, 48, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    first_page=st.sampled_from([0, 5]),
    seed=st.integers(0, 2**16),
)
@example(kind="value", head_dim=64, page=16, dtype=torch.float32, first_page=0, seed=4979)  # a code and a scale differ
@settings(max_examples=25, deadline=None)
def test_encodes_like_the_definition(kind, head_dim, page, dtype, first_page, seed):
    torch.manual_seed(seed)
    widths = random_widths(2, head_dim, torch.Generator().manual_seed(seed))
    basis = random_basis(kind, widths, head_dim, page, frame=4 * page, seed=seed)
    pages = torch.randn(2, 2, 3, page, head_dim).to(dtype)
    expected = transform_naive.encode(pages, basis, first_page)
    for name in instruction_sets():
        got = transform_cpu.encode(library(), pages, basis, first_page)
        if got.scales is None:
            assert torch.equal(got.codes, expected.codes), name  # the same operations on the same projection
            same = torch.ones_like(expected.errors, dtype=torch.bool)
        else:  # sums over directions are in another order: a scale may round to the next float16, and move a code,
            same = torch.isclose(got.scales, expected.scales, rtol=2e-3, atol=0)  # which seldom moves the scale as well
            assert (~same).sum() <= 2e-2 * same.numel(), name
            torch.testing.assert_close(got.scales, expected.scales, rtol=5e-2, atol=0)
            assert (got.codes != expected.codes).sum() <= 1e-2 * got.codes.numel(), name
        torch.testing.assert_close(got.errors[same], expected.errors[same], rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_single_tokens_are_coded_like_the_definition(kind, interleaved, dtype):
    """Tokens of several frames, parts of a wider tensor; sums are in another order, which moves few codes."""
    widths = random_widths(2, 64, torch.Generator().manual_seed(1))
    basis = random_basis(kind, widths, 64, 16, frame=32, interleaved=interleaved, seed=1)
    states = torch.randn(90, 2, 128, generator=torch.Generator().manual_seed(2)).to(dtype)[..., 64:]
    frames = torch.arange(90) // 32 if kind == "key" else None
    z = transform_naive.project_tokens(states.transpose(0, 1)[None, :, :, None], basis, frames)
    codes, scales, _ = transform_naive.code(z, basis)
    for name in instruction_sets():
        got, of_tokens = transform_cpu.code(library(), states, basis, frames)
        wrong = (got.transpose(0, 1) != codes[0, :, :, 0]).sum()
        assert wrong <= 1e-3 * got.numel(), (name, wrong)
        if scales is None:
            assert of_tokens is None
        else:
            torch.testing.assert_close(of_tokens.T, scales[0, :, :, 0], rtol=2e-3, atol=0, msg=name)


def test_a_single_token_is_the_same_among_others():
    basis = random_basis("value", random_widths(2, 64, torch.Generator().manual_seed(1)), 64, 16, seed=1)
    states = torch.randn(20, 2, 64, generator=torch.Generator().manual_seed(2))
    codes, scales = transform_cpu.code(library(), states, basis, None)
    for token in (0, 7, 19):
        alone = transform_cpu.code(library(), states[token : token + 1], basis, None)
        assert torch.equal(alone[0][0], codes[token]) and torch.equal(alone[1][0], scales[token])


def test_tokens_of_other_sizes_and_types_are_left_to_the_definition():
    even, odd = (random_basis("key", random_widths(2, dim, torch.Generator()), dim, 16) for dim in (64, 20))
    assert transform_cpu.takes(torch.zeros(1, 2, 64, dtype=torch.bfloat16), even)
    assert not transform_cpu.takes(torch.zeros(1, 2, 64, dtype=torch.float64), even)
    assert not transform_cpu.takes(torch.zeros(1, 2, 20), odd)


def test_tokens_that_are_not_finite_have_errors_that_are_not():
    basis = random_basis("value", ((2, 0), (3, 1)), 16, 16)
    pages = torch.randn(1, 2, 2, 16, 16)
    pages[0, 0, 0, 3, 5] = torch.nan
    pages[0, 1, 1, 4, 2] = torch.inf
    for name in instruction_sets():
        bad = ~torch.isfinite(transform_cpu.encode(library(), pages, basis).errors)
        assert bad.nonzero().tolist() == [[0, 0, 0, 3], [0, 1, 1, 4]], name


def test_misfits_are_refused():
    basis = random_basis("key", ((2, 0), (3, 1)), 16, 16)
    with pytest.raises(ValueError, match=r"expected pages \[B, 2, pages, 16, 16\]"):
        encode(torch.randn(1, 1, 2, 16, 16), basis)


def problem_of(
    head_dim=32, page=16, pages=9, exact=1, frame=64, sinks=3, tail=9, queries=1, ratio=2, heads=2, seed=0,
    interleaved=False, dtype=torch.float32, **options,
):  # fmt: skip
    """Attention over coded keys and values, their exact tokens at the same places."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    key, value = (
        random_basis(kind, random_widths(heads, head_dim, generator), head_dim, page, exact, frame, interleaved, seed)
        for kind in ("key", "value")
    )
    places = random_places(2, heads, pages, page, exact)
    key, value = (coded_segments(basis, sinks, pages, tail, places, dtype=dtype) for basis in (key, value))
    return AttentionProblem(torch.randn(2, heads * ratio, queries, head_dim), key, value, head_dim**-0.5, **options)


def assert_attends(problem):
    expected, logarithms = naive.attend(replace(problem, query=problem.query.double()))
    for name in instruction_sets():
        got, sums = cpu.attend(library(), problem)
        assert relative_rms(got, expected) < RMS, name
        torch.testing.assert_close(sums.double(), logarithms, rtol=0, atol=LOGARITHM)


@pytest.mark.slow
@given(
    head_dim=st.sampled_from([16, 32, 80, 128]),
    page_and_pages=st.sampled_from([(16, 0), (16, 9), (48, 3), (128, 1), (128, 6)]),
    exact=st.sampled_from([0, 1, 3]),
    frame=st.sampled_from([None, 1, 2]),
    sinks=st.sampled_from([0, 3]),
    queries=st.sampled_from([1, 2, 7]),
    ratio=st.sampled_from([1, 2, 3, 4]),
    masking=st.sampled_from([None, "bool", "additive"]),
    softcap=st.sampled_from([None, 1.5]),
    logits=st.booleans(),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_attends_like_the_definition(
    head_dim, page_and_pages, exact, frame, sinks, queries, ratio, masking, softcap, logits, interleaved, dtype, seed
):
    page, pages = page_and_pages
    tail, frame = queries + seed % 5, frame and frame * page
    mask = mask_of(masking, queries, sinks + pages * page + tail, seed % 9)
    sink_logits = torch.randn(2 * ratio) if logits else None
    assert_attends(
        problem_of(
            head_dim,
            page,
            pages,
            exact,
            frame,
            sinks,
            tail,
            queries,
            ratio,
            seed=seed,
            interleaved=interleaved,
            dtype=dtype,
            mask=mask,
            softcap=softcap,
            sink_logits=sink_logits,
        )
    )


@pytest.mark.parametrize("width", range(7))
def test_attends_to_every_width(width):
    torch.manual_seed(width)
    for page in (16, 128):
        places = random_places(2, 2, 5, page, 1)
        key, value = (random_basis(kind, ((width,) * 4, (width, 0, 0, 0)), 32, page, 1) for kind in ("key", "value"))
        key, value = (coded_segments(basis, 0, 5, 1, places) for basis in (key, value))
        assert_attends(AttentionProblem(torch.randn(2, 6, 1, 32), key, value, scaling=0.2))


@pytest.mark.parametrize(("k_bits", "v_bits"), [("coded", 3), (2, "coded"), ("coded", 16), (16, "coded")])
def test_the_other_tensor_may_be_stored_otherwise(k_bits, v_bits):
    torch.manual_seed(0)
    tensors = []
    for kind, bits in (("key", k_bits), ("value", v_bits)):
        if bits == "coded":
            basis = random_basis(kind, ((5, 2, 1, 0), (2, 2, 2, 2)), 32, 128, 1)
            tensors.append(coded_segments(basis, 3, 4, 9, random_places(2, 2, 4, 128, 1)))
        else:
            tensors.append(segments(kind, bits, 3, 4, 9, page=128, group=32))
    assert_attends(AttentionProblem(torch.randn(2, 4, 2, 32), *tensors, scaling=0.2))


def test_long_contexts_are_split_and_merged():
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert_attends(problem_of(64, 128, 40, frame=1024, ratio=3, heads=1))
        finally:
            torch.set_num_threads(before)


def test_weights_of_very_different_size_keep_their_sum():
    """One token has nearly all attention and hardly any value: the others, together, are most of the output."""
    torch.manual_seed(0)
    basis = {kind: random_basis(kind, ((2, 2, 2, 2),), 32, 128) for kind in ("key", "value")}
    keys, values = torch.randn(1, 1, 4 * 128, 32) / 8, torch.randn(1, 1, 4 * 128, 32)
    query = torch.randn(1, 1, 1, 32)
    keys[0, 0, 77] = query[0, 0, 0] * 2
    values[0, 0, 77] = 0
    ends = torch.randn(1, 1, 1, 32)
    key, value = (Segments(None, coded(basis[k], x), ends) for k, x in (("key", keys), ("value", values)))
    problem = AttentionProblem(query, key, value, scaling=0.1)
    expected, _ = naive.attend(replace(problem, query=query.double()))
    for name in instruction_sets():
        assert relative_rms(cpu.attend(library(), problem)[0], expected) < RMS, name


def test_a_row_that_sees_nothing_is_zero():
    problem = problem_of()
    problem = replace(problem, mask=torch.zeros(2, 1, 1, problem.key.shape[2], dtype=torch.bool))
    for name in instruction_sets():
        assert (cpu.attend(library(), problem)[0] == 0).all(), name


def test_more_frames_later_are_turned_to_as_well():
    """Cosines and sines are kept from call to call, and there are more frames as the context grows.

    The first pages are described for C before there are more frames, and read again after that.
    """
    problem = problem_of(pages=40, frame=16)
    key, value = problem.key, problem.value
    contexts = {
        pages: [replace(tensor, packed=first_pages(tensor.packed, pages)) for tensor in (key, value)]
        for pages in (2, 40, 4)
    }
    for pages in (2, 40, 4, 2):
        assert_attends(replace(problem, key=contexts[pages][0], value=contexts[pages][1]))


def first_pages(coded, pages):
    """The first pages of some; exact tokens of the others are nothing now."""
    scales, places = coded.scales, coded.places
    order = torch.where(places < pages * coded.page, places, -1).sort()
    exact = coded.exact.gather(2, order.indices[..., None].expand_as(coded.exact))
    return replace(
        coded,
        codes=coded.codes[:, :, :pages],
        scales=None if scales is None else scales[:, :, :pages],
        places=order.values,
        exact=exact,
    )


def test_many_exact_tokens_of_one_page_and_none_of_others():
    """Those of one head are all in the second page, those of the other on the edges of pages."""
    torch.manual_seed(0)
    for page in (16, 128):
        of_heads = torch.arange(page, page + 8), torch.arange(8).add(1).mul(page // 2) - 1
        places = torch.stack(of_heads).int().expand(2, 2, 8)
        both = (random_basis(kind, ((3, 2, 1, 0), (2, 2, 2, 2)), 32, page, 2) for kind in ("key", "value"))
        key, value = (coded_segments(basis, 3, 4, 1, places) for basis in both)
        assert_attends(AttentionProblem(torch.randn(2, 6, 1, 32), key, value, scaling=0.2))


def test_what_has_no_kernel_falls_back_by_name():
    for head_dim, page in itertools.chain([(20, 16)], [(32, 2048)]):
        problem = problem_of(head_dim, page, pages=1, frame=None)
        warn_once.cache_clear()
        with pytest.warns(UserWarning, match=f"pages of \\[{page}\\], heads of {head_dim}.* has no CPU kernel"):
            got, _ = attend(problem)
        torch.testing.assert_close(got, naive.attend(problem)[0])


def test_does_without_the_library(monkeypatch):
    monkeypatch.setattr("kvmix_kernels.attend.library", lambda: None)
    monkeypatch.setattr("kvmix_kernels.transform.library", lambda: None)
    problem = problem_of()
    torch.testing.assert_close(attend(problem)[0], naive.attend(problem)[0])
    basis = problem.value.packed.basis
    pages = torch.randn(1, 2, 1, 16, 32)
    assert torch.equal(encode(pages, basis).codes, transform_naive.encode(pages, basis).codes)
