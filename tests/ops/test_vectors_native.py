"""Attention over vector codes on every instruction set, within 1e-5 of float64."""

from dataclasses import replace

import pytest
import torch
from attending import instruction_sets, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.attend import AttentionProblem, attend, cpu, naive
from kvmix_kernels.runtime.native import library
from kvmix_kernels.segments import Segments
from poisoned import in_a_poisoned_buffer, mask_of, segments

from kvmix_cli.cache.packing.encoded import pages_of
from kvmix_cli.codecs.vectors import SPANS, LearnedVectors, Vectors

pytestmark = pytest.mark.skipif(library() is None, reason="there is no native library")

RMS = 1e-5
"""Nothing is rounded but sums in float32 of products in float32, of at most 128 channels and some thousand tokens."""
LOGARITHM = 1e-5
"""Absolute."""


def in_vectors(
    kind, bits, sinks=3, pages=4, tail=9, head_dim=32, page=16, heads=2, learned=False, dtype=torch.float32,
    scale_dtype="float16",
):  # fmt: skip
    """Random codes with random scales or, if they are learned, random codebooks; poison around them."""
    codec = (LearnedVectors if learned else Vectors)(kind, bits, head_dim, page, None, scale_dtype)
    if learned:
        books = torch.randn(heads, head_dim // SPANS[bits], 1 << bits * SPANS[bits], SPANS[bits])
        codec = replace(codec, books=books)
    parts = {"codes": torch.randint(256, (2, heads, pages, codec.code_bytes), dtype=torch.uint8)}
    if not learned:
        parts["scales"] = (torch.rand(2, heads, pages, page) + 0.5).to(getattr(torch, scale_dtype))
    view = pages_of(codec, {name: in_a_poisoned_buffer(part) for name, part in parts.items()})
    sink, rest = (in_a_poisoned_buffer(torch.randn(2, heads, count, head_dim).to(dtype)) for count in (sinks, tail))
    return Segments(sink if sinks else None, view if pages else None, rest)


def problem_of(k_bits, v_bits, queries=1, ratio=2, heads=2, options=None, **sizes):
    key, value = (in_vectors(kind, bits, heads=heads, **sizes) for kind, bits in (("key", k_bits), ("value", v_bits)))
    dim = key.shape[3]
    return AttentionProblem(torch.randn(2, heads * ratio, queries, dim), key, value, dim**-0.5, **(options or {}))


def assert_attends(problem):
    expected, logarithms = naive.attend(replace(problem, query=problem.query.double()))
    for name in instruction_sets():
        solved = cpu.attend(library(), problem)
        assert solved is not None, name
        assert relative_rms(solved[0], expected) < RMS, name
        torch.testing.assert_close(solved[1].double(), logarithms, rtol=0, atol=LOGARITHM)


@pytest.mark.slow
@given(
    bits=st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3, 4])),
    head_dim=st.sampled_from([16, 48, 64, 80, 128]),
    page_and_pages=st.sampled_from([(16, 0), (16, 9), (48, 3), (128, 1), (128, 5)]),
    sinks=st.sampled_from([0, 3]),
    queries=st.sampled_from([1, 2, 7]),
    ratio=st.sampled_from([1, 2, 3, 4, 7]),
    masking=st.sampled_from([None, "bool", "additive"]),
    softcap=st.sampled_from([None, 1.5]),
    logits=st.booleans(),
    learned=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15, deadline=None)
def test_attends_like_the_definition(
    bits, head_dim, page_and_pages, sinks, queries, ratio, masking, softcap, logits, learned, seed
):
    torch.manual_seed(seed)
    (page, pages), tail = page_and_pages, queries + seed % 5
    options = {
        "mask": mask_of(masking, queries, sinks + pages * page + tail, seed % 9),
        "softcap": softcap,
        "sink_logits": torch.randn(2 * ratio) if logits else None,
    }
    sizes = {"sinks": sinks, "pages": pages, "tail": tail, "head_dim": head_dim, "page": page, "learned": learned}
    assert_attends(problem_of(*bits, queries, ratio, options=options, **sizes))


@pytest.mark.parametrize("bits", SPANS)
@pytest.mark.parametrize("ratio", [1, 3, 4, 6])
def test_attends_to_every_width(bits, ratio):
    """Left-padded, and with sinks and a tail."""
    torch.manual_seed(bits)
    for head_dim in (64, 128):
        mask = mask_of("bool", 2, 3 + 4 * 16 + 9, 8)
        assert_attends(problem_of(bits, bits, 2, ratio, head_dim=head_dim, options={"mask": mask}))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_group_of_every_head_has_a_codebook_of_its_own(bits):
    torch.manual_seed(bits)
    assert_attends(problem_of(bits, bits, heads=3, learned=True))


def test_many_queries_over_single_channels_are_left_to_pytorch():
    torch.manual_seed(0)
    for bits, queries, are_taken in ((8, 32, True), (8, 33, False), (4, 33, True)):
        problem = problem_of(bits, bits, queries, tail=40)
        assert (cpu.attend(library(), problem) is not None) == are_taken
        expected, _ = naive.attend(replace(problem, query=problem.query.double()))
        assert relative_rms(attend(problem)[0], expected) < RMS


def test_keys_that_are_turned_to_their_positions_are_left_to_pytorch():
    torch.manual_seed(0)
    problem = problem_of(2, 2, learned=True)
    turned = replace(problem.key.packed, turn=lambda pages, first: pages.flip(-1) + first)
    problem = replace(problem, key=replace(problem.key, packed=turned))
    assert cpu.attend(library(), problem) is None
    expected, _ = naive.attend(replace(problem, query=problem.query.double()))
    assert relative_rms(attend(problem)[0], expected) < RMS


def test_a_window_hides_all_older_tokens():
    torch.manual_seed(0)
    mask = torch.zeros(1, 1, 1, 3 + 4 * 128 + 9, dtype=torch.bool)
    mask[..., -200:] = True
    assert_attends(problem_of(2, 2, page=128, options={"mask": mask}))


def test_rows_that_may_see_nothing_are_zero():
    torch.manual_seed(0)
    problem = problem_of(2, 3, options={"mask": torch.zeros(2, 1, 1, 3 + 4 * 16 + 9, dtype=torch.bool)})
    for name in instruction_sets():
        output, logarithms = attend(problem)
        assert (output == 0).all() and (logarithms == -torch.inf).all(), name


@pytest.mark.parametrize(("k_bits", "v_bits"), [("vectors", 3), (2, "vectors"), ("vectors", 16), (16, "vectors")])
def test_the_other_tensor_may_be_stored_otherwise(k_bits, v_bits):
    torch.manual_seed(0)
    tensors = [
        in_vectors(kind, 2, page=128) if bits == "vectors" else segments(kind, bits, 3, 4, 9, page=128, group=32)
        for kind, bits in (("key", k_bits), ("value", v_bits))
    ]
    problem = AttentionProblem(torch.randn(2, 4, 2, 32), *tensors, scaling=0.2)
    expected, _ = naive.attend(replace(problem, query=problem.query.double()))
    for name in instruction_sets():
        solved = cpu.attend(library(), problem)
        assert solved is not None and relative_rms(solved[0], expected) < 1e-3, name  # of affine codes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_and_scales_in_half_precision(dtype):
    torch.manual_seed(0)
    name = str(dtype).removeprefix("torch.")
    assert_attends(problem_of(2, 2, dtype=dtype, scale_dtype=name))


def test_long_contexts_are_split_and_merged():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            assert_attends(problem_of(2, 1, pages=40, page=128, heads=1, ratio=3, head_dim=64))
        finally:
            torch.set_num_threads(before)


def test_encoded_tokens_are_attended_to_as_they_are_decoded():
    """Codes of a codec, against attention in float64 over what it decodes to."""
    torch.manual_seed(0)
    for bits in SPANS:
        states = [torch.randn(1, 2, 4 * 48, 64) for _ in range(2)]
        codecs = Vectors("key", bits, 64, 48), Vectors("value", bits, 64, 48)
        parts = [codec.encode(each.unflatten(2, (-1, 48))) for codec, each in zip(codecs, states, strict=True)]
        views = [pages_of(codec, part) for codec, part in zip(codecs, parts, strict=True)]
        tensors = [Segments(None, view, each[:, :, :0]) for view, each in zip(views, states, strict=True)]
        query = torch.randn(1, 8, 1, 64)
        key, value = (
            codec.decode(part).flatten(2, 3).double().repeat_interleave(4, 1)
            for codec, part in zip(codecs, parts, strict=True)
        )
        expected = (query.double() @ key.mT / 8).softmax(-1) @ value
        for name in instruction_sets():
            got, _ = attend(AttentionProblem(query, *tensors, scaling=1 / 8))
            assert relative_rms(got, expected) < RMS, (bits, name)
