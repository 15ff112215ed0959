"""The attention kernels over pages of few tokens, of which several are contracted together."""

import pytest
import torch
from attending import relative_rms
from kvmix_kernels.attend import naive
from kvmix_kernels.attend.triton import attend, shares, unsupported
from poisoned import segments

RMS = 5e-3
"""Relative, as everywhere."""


@pytest.mark.parametrize(
    ("page", "k_bits", "v_bits"),
    [(16, 1, 3), (16, 2, 8), (16, 16, 1), (16, 3, 16), (32, 1, 1), (32, 3, 4), (32, 8, 2), (32, 16, 3), (32, 4, 16)],
)
def test_pages_that_do_not_fill_a_step(page, k_bits, v_bits, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(shares, "TOKENS_PER_SPLIT", 5 * page)
    k_pages, v_pages = 0 if k_bits == 16 else 7, 0 if v_bits == 16 else 6
    tokens = 3 + 7 * page + 9
    key, value = (
        segments(kind, bits, 3, pages, tokens - 3 - pages * page, 64, page, 32, torch.bfloat16)
        for kind, bits, pages in (("key", k_bits, k_pages), ("value", v_bits, v_pages))
    )
    query = torch.randn(2, 2, 2, 64).bfloat16()
    assert unsupported(query, key, value) is None
    got, logarithms = attend(query, key, value, scaling=0.125)
    expected, meant = naive.attend(query.double(), key, value, scaling=0.125)
    assert relative_rms(got, expected) < RMS
    torch.testing.assert_close(logarithms.double(), meant, rtol=0, atol=1e-2)
