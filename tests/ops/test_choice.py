"""Attention over the pages that a query chooses, against one float64 softmax over the tokens in them."""

from dataclasses import replace

import pytest
import torch
from attending import paths, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.attend import attend, choice, choice_cpu
from kvmix_kernels.attend.choice import gathered, with_all_pages, with_chosen_pages
from kvmix_kernels.runtime.native import library, library_for
from kvmix_kernels.runtime.native.processor import available
from page_choices import hidden_by_choice, summarized_problem
from reference import dense_attention

RMS = 2e-3
"""Relative. The native paths round coefficients to 16 bits."""

native = pytest.mark.skipif(library() is None, reason="there is no native library")


def mask_of(kind, tokens, hidden):
    """The first tokens of the first sequence hidden, as left padding is."""
    if kind is None:
        return None
    mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    mask[0, :, :, :hidden] = False
    return mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@given(
    codec=st.sampled_from(["affine", "coded", "frames"]),
    pages=st.integers(2, 6),
    count=st.integers(1, 6),
    kind=st.sampled_from(["mean", "range", "codes"]),
    sharing=st.sampled_from(["max", "sum", "layer"]),
    ratio=st.sampled_from([1, 3]),
    masking=st.sampled_from([None, "bool", "additive"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_equals_dense_attention_over_the_chosen_pages(codec, pages, count, kind, sharing, ratio, masking, seed):
    torch.manual_seed(seed)
    tokens = 3 + pages * 64 + 10
    seen = mask_of(None if masking is None else "bool", tokens, 3 + 64 + seed % 60)
    problem = summarized_problem(codec, pages, min(count, pages), kind, sharing, ratio, seen)
    hidden, chosen = hidden_by_choice(problem)
    visible = ~hidden if seen is None else ~hidden & seen
    key, value = (with_all_pages(problem).key.dequantize(), problem.value.dequantize())
    expected = dense_attention(problem.query, key, value, 0.3, visible, None, None)
    given_mask = mask_of(masking, tokens, 3 + 64 + seed % 60)
    read = with_chosen_pages(replace(problem, mask=given_mask))
    for name, path in paths():
        assert relative_rms(path(read)[0], expected) < RMS, name
        assert relative_rms(path(gathered(read))[0], expected) < RMS, name
    if count < pages:
        numbers = read.key.packed.numbers
        assert all(set(numbers[at].tolist()) == pages for at, pages in chosen.items())
        assert (numbers.diff(dim=-1) > 0).all()


@native
@pytest.mark.parametrize("kind", ["mean", "range", "codes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_instruction_set_chooses_what_pytorch_does(kind, dtype):
    torch.manual_seed(0)
    for sharing in ("max", "sum", "layer"):
        problem = summarized_problem("affine", 37, 9, kind, sharing, 5)
        pages = problem.key.packed
        books = None if pages.books is None else pages.books.to(dtype)
        summary = pages.summary if kind == "codes" else pages.summary.to(dtype)
        pages, query = replace(pages, summary=summary, books=books), problem.query[:, :, 0].to(dtype)
        wide = replace(
            pages,
            summary=summary if kind == "codes" else summary.double(),
            books=None if books is None else books.double(),
        )
        expected = choice._chosen_pages(query.double() * 0.3, wide, None)
        for isa in available():
            library = library_for(isa)
            assert torch.equal(choice_cpu.chosen_pages(library, query, 0.3, pages), expected), isa


@native
def test_what_is_not_finite_is_worth_nothing_and_as_many_pages_are_chosen():
    problem = summarized_problem("affine", 20, 6, "range", "max", 2)
    query = problem.query[:, :, 0].clone()
    query[0] = torch.nan
    numbers = choice_cpu.chosen_pages(library(), query, 0.3, problem.key.packed)
    assert torch.equal(numbers[0], torch.arange(6, dtype=torch.int32).expand(2, -1))
    assert ((numbers >= 0) & (numbers < 20)).all()
    assert (numbers.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("codec", ["affine", "frames"])
def test_all_pages_is_the_ordinary_path_bit_for_bit(codec):
    problem = summarized_problem(codec, 5, 5, "mean", "max", 2)
    ordinary = attend(with_all_pages(problem))
    for one, other in zip(attend(problem), ordinary, strict=True):
        assert torch.equal(one, other)


def test_several_queries_read_all_pages():
    problem = summarized_problem("affine", 5, 1, "mean", "max", 2, queries=3)
    assert torch.equal(attend(problem)[0], attend(with_all_pages(problem))[0])


def test_a_forward_on_a_gpu_copies_the_chosen_pages_and_reads_all_of_transform_codes(monkeypatch):
    from kvmix_kernels import attend as room

    affine, coded = (summarized_problem(codec, 5, 2, "mean", "max", 2) for codec in ("affine", "coded"))
    monkeypatch.setattr(room.gpu, "is_usable", lambda device: True)
    assert room._with_its_pages(affine).key.packed.pages == 2
    with pytest.warns(UserWarning, match="transform codes; reading all of them"):
        assert room._with_its_pages(coded).key.packed.pages == 5


def test_values_in_other_pages_are_refused():
    problem = summarized_problem("affine", 5, 2, "mean", "max", 2)
    values = replace(problem.value, packed=replace(problem.value.packed, words=problem.value.packed.words[:, :, :4]))
    longer = torch.cat([problem.value.tail, problem.value.tail.new_zeros(2, 2, 64, 64)], dim=2)
    with pytest.raises(ValueError, match="expected the same tokens in each page"):
        choice.with_chosen_pages(replace(problem, value=replace(values, tail=longer)))
