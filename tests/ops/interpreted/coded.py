"""The attention kernel for transform codes, and the one that makes them, against the definition."""

from dataclasses import replace

import pytest
import torch
from attending import relative_rms
from coded_pages import coded_segments
from kvmix_kernels.attend import AttentionProblem, naive
from kvmix_kernels.attend.triton import attend, unsupported
from poisoned import mask_of, splits_of

RMS = 5e-3
LOGARITHM = 1e-2

CASES = {
    "widths of every kind": {"menu": ["6543", "3322"]},
    "nothing of a head": {"menu": ["0000", "6300", "5510"], "exact": 1},
    "frames": {"menu": ["6543", "4100"], "frame": 128, "exact": 1, "pages": 5},
    "one page at a time": {"menu": ["5510", "1111"], "page": 128, "pages": 2, "frame": 128, "exact": 3},
    "small pages": {"menu": ["6300", "5510"], "page": 16, "pages": 11, "exact": 1},
    "several queries": {"menu": ["3322"], "queries": 3, "ratio": 2, "exact": 1, "masking": "bool"},
    "without a mask": {"menu": ["3322"], "queries": 3, "ratio": 3, "exact": 1},
    "an additive mask": {"menu": ["4100"], "masking": "additive", "exact": 1, "softcap": 1.5, "logits": True},
    "many rows": {"menu": ["4100"], "queries": 6, "ratio": 6, "head_dim": 32},
    "halves": {"menu": ["6543", "3322"], "dtype": torch.bfloat16, "exact": 2, "head_dim": 128, "ratio": 4},
}


def problem_of(
    menu, pages=3, page=64, head_dim=64, frame=None, exact=0, dtype=torch.float32, queries=1, ratio=2, masking=None,
    softcap=None, logits=False, sinks=3,
):  # fmt: skip
    torch.manual_seed(len(menu) + pages)
    key, value = coded_segments(menu, sinks, pages, queries + 20, head_dim, page, frame, exact, dtype)
    heads, tokens = ratio * len(menu), key.shape[2]
    query = torch.randn(2, heads, queries, head_dim).to(dtype)
    mask = mask_of(masking, queries, tokens, sinks + page + 5)
    return AttentionProblem(query, key, value, head_dim**-0.5, mask, softcap, torch.randn(heads) if logits else None)


@pytest.mark.parametrize("split", [128, 1024])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition(case, split):
    problem = problem_of(**CASES[case])
    assert unsupported(problem) is None
    with splits_of(split):
        got, logarithms = attend(problem)
    expected, meant = naive.attend(replace(problem, query=problem.query.double()))
    assert relative_rms(got, expected) < RMS
    torch.testing.assert_close(logarithms.double(), meant, rtol=0, atol=LOGARITHM)
