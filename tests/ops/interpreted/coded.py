"""The attention kernel for transform codes, and the one that makes them, against the definition."""

from dataclasses import replace

import pytest
import torch
from attending import like_the_definition
from coded_pages import basis_of, coded_pair
from kvmix_kernels.attend import AttentionProblem
from kvmix_kernels.attend.triton import attend, coded_trial, is_trusted, trial, unsupported
from kvmix_kernels.attend.triton.planes import planes_of
from kvmix_kernels.segments import Segments
from kvmix_kernels.transform import naive as definition
from kvmix_kernels.transform import triton as transforming
from poisoned import mask_of, splits_of

CASES = {
    "widths of every kind": {"menu": ["6543", "3322"], "split": 128, "pages": 3},
    "nothing of a head": {"menu": ["0000", "6300"], "exact": 1},
    "frames": {"menu": ["6543"], "frame": 128, "exact": 1, "pages": 3, "split": 128, "head_dim": 64},
    "one page at a time": {"menu": ["5510"], "page": 128, "pages": 2, "frame": 128, "exact": 3, "split": 128},
    "small pages": {"menu": ["6300"], "page": 16, "pages": 9, "exact": 1},
    "several queries": {"menu": ["3322"], "queries": 3, "exact": 1, "masking": "bool", "batch": 2},
    "without a mask": {"menu": ["4100"], "queries": 3, "ratio": 3, "exact": 1},
    "an additive mask": {
        "menu": ["4100"],
        "masking": "additive",
        "exact": 1,
        "softcap": 1.5,
        "logits": True,
        "batch": 2,
    },
    "many rows": {"menu": ["1111"], "queries": 6, "ratio": 6, "pages": 1},
    "halves": {"menu": ["6666"], "dtype": torch.bfloat16, "exact": 2, "head_dim": 64},
}


def problem_of(
    menu, pages=2, page=64, head_dim=32, frame=None, exact=0, dtype=torch.float32, queries=1, ratio=2, masking=None,
    softcap=None, logits=False, sinks=3, batch=1,
):  # fmt: skip
    torch.manual_seed(len(menu) + pages)
    key, value = coded_pair(menu, sinks, pages, queries + 20, head_dim, page, frame, exact, dtype, batch)
    heads, tokens = ratio * len(menu), key.shape[2]
    query = torch.randn(batch, heads, queries, head_dim).to(dtype)
    mask = mask_of(masking, queries, tokens, sinks + page + 5)
    return AttentionProblem(query, key, value, head_dim**-0.5, mask, softcap, torch.randn(heads) if logits else None)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case):
    options = CASES[case] | {}
    split = options.pop("split", 1024)
    problem = problem_of(**options)
    assert unsupported(problem) is None
    with splits_of(split):
        got, logarithms = attend(problem)
    like_the_definition(problem, got, logarithms)


def test_a_row_that_sees_nothing_is_zero():
    problem = problem_of(["4100"], pages=1, exact=1)
    mask = torch.zeros(1, 1, 1, problem.key.shape[2], dtype=torch.bool)
    for each in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        output, logarithms = attend(replace(problem, mask=each))
        assert (output == 0).all()
        assert (logarithms == -torch.inf).all()


def test_directions_of_zero_bits_are_not_in_the_tables():
    planes = planes_of(basis_of("key", ["6300", "0000", "5510"], 64, 128))
    assert planes.chunks.tolist() == [[0, 1, 3, 4], [0, 0, 0, 0], [0, 2, 2, 5]]
    assert (planes.places >= 0).sum(1).tolist() == [64, 0, 80]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"page": 48}, "pages of 48 tokens"),
        ({"frame": 64}, "frames of 64 tokens"),
        ({"queries": 30, "tail": 10}, "30 queries, the first of which are older"),
    ],
)
def test_what_has_no_kernel_is_named(change, complaint):
    shape = {"pages": 1, "page": 64, "tail": 40, "frame": None, "queries": 1} | change
    queries = shape.pop("queries")
    key, value = coded_pair(["4100"], 3, head_dim=32, batch=1, **shape)
    assert complaint in unsupported(AttentionProblem(torch.randn(1, 2, queries, 32), key, value, scaling=1.0))


def test_codes_of_one_side_alone_have_no_kernel():
    key, value = coded_pair(["4100"], 3, 1, 40, head_dim=32, batch=1)
    plain = Segments(None, None, value.dequantize())
    complaint = unsupported(AttentionProblem(torch.randn(1, 2, 1, 32), key, plain, scaling=1.0))
    assert complaint == "transform codes of keys or values alone"


@pytest.mark.filterwarnings("error::UserWarning")
def test_trials_pass(monkeypatch):
    monkeypatch.setattr(trial, "first_kinds", lambda device: [])
    monkeypatch.setattr(coded_trial, "BATCH", 1)
    monkeypatch.setattr(coded_trial, "TOKENS", 128)
    assert is_trusted(problem_of(["4100"], pages=1, exact=1))
    assert transforming.passes(torch.device("cpu"), "value", 32, 64, torch.float32)


@pytest.mark.parametrize(
    ("kind", "menu", "page", "head_dim", "dtype"),
    [
        ("key", ["6543", "3322", "0000"], 64, 64, torch.float32),
        ("value", ["6543", "5510", "0000"], 64, 64, torch.bfloat16),
        ("key", ["6300"], 16, 40, torch.float16),
        ("value", ["6666", "4100"], 48, 128, torch.float32),
    ],
)
def test_encodes_as_the_definition_but_for_ties(kind, menu, page, head_dim, dtype):
    basis = basis_of(kind, menu, head_dim, page, frame=2 * page if kind == "key" else None)
    pages = torch.randn(2, len(menu), 3, page, head_dim).to(dtype)
    got, expected = transforming.encode(pages, basis, 1), definition.encode(pages, basis, 1)
    assert (got.codes != expected.codes).float().mean() < 1e-3  # sums are in another order, which moves some ties
    torch.testing.assert_close(got.errors, expected.errors, rtol=1e-4, atol=1e-5)
    if kind == "value":
        torch.testing.assert_close(got.scales, expected.scales, rtol=2e-3, atol=0)  # the last bit of float16
