"""Attention over sink | packed pages | tail against one dense float64 softmax over the dequantized tokens."""

import pytest
import torch
from attending import paths, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from kvmix_kernels.attend import AttentionProblem, naive
from kvmix_kernels.pages import Packed
from poisoned import segments
from reference import dense_attention

RMS = {"naive": 1e-5}
"""Relative; for float32 sums of at most a few thousand products. The native path rounds coefficients to 16 bits."""
RMS_NATIVE = 1e-3


@pytest.mark.slow
@given(
    k_bits=st.sampled_from([1, 2, 3, 4, 8, 16]),
    v_bits=st.sampled_from([1, 2, 3, 4, 8, 16]),
    sinks=st.sampled_from([0, 3]),
    k_pages=st.integers(0, 5),
    v_pages=st.integers(0, 5),
    queries=st.sampled_from([1, 2, 7]),
    ratio=st.sampled_from([1, 2, 4]),
    masking=st.sampled_from([None, "bool", "additive"]),
    softcap=st.sampled_from([None, 1.5]),
    logits=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_equals_dense_attention(
    k_bits, v_bits, sinks, k_pages, v_pages, queries, ratio, masking, softcap, logits, seed
):
    torch.manual_seed(seed)
    tokens = sinks + 16 * max(k_pages, v_pages) + queries + seed % 5
    key = segments("key", k_bits, sinks, k_pages, tokens - sinks - 16 * k_pages)
    value = segments("value", v_bits, sinks, v_pages, tokens - sinks - 16 * v_pages)
    query = torch.randn(2, 2 * ratio, queries, 32)
    mask = None
    if masking:
        mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries).expand(2, 1, -1, -1).clone()
        mask[0, :, :, : seed % tokens] = False
        if masking == "additive":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    sink_logits = torch.randn(2 * ratio) if logits else None
    problem = AttentionProblem(query, key, value, 0.3, mask, softcap, sink_logits)
    expected = dense_attention(query, key.dequantize(), value.dequantize(), 0.3, mask, softcap, sink_logits)
    for name, path in paths():
        assert relative_rms(path(problem)[0], expected) < RMS.get(name, RMS_NATIVE), name


def test_tiles_of_tokens_and_of_queries_change_nothing(monkeypatch):
    torch.manual_seed(0)
    key, value = (segments(kind, 4, 3, 20, 30) for kind in ("key", "value"))
    query = torch.randn(2, 4, 25, 32)
    mask = torch.rand(2, 1, 25, key.shape[2]) > 0.3
    problems = [AttentionProblem(query, key, value, scaling=0.2, mask=m) for m in (None, mask)]
    whole = [naive.attend(problem)[0] for problem in problems]
    monkeypatch.setattr(naive, "TOKENS_PER_TILE", 48)
    monkeypatch.setattr(naive, "QUERIES_PER_TILE", 4)
    tiled = [naive.attend(problem)[0] for problem in problems]
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other)


def test_never_reads_more_than_a_tile(monkeypatch):
    monkeypatch.setattr(naive, "TOKENS_PER_TILE", 32)
    read = Packed.read
    sizes = []
    monkeypatch.setattr(
        Packed, "read", lambda self, start, stop, dtype: sizes.append(stop - start) or read(self, start, stop, dtype)
    )
    key, value = (segments(kind, 2, 0, 12, 5) for kind in ("key", "value"))
    naive.attend(AttentionProblem(torch.randn(2, 2, 1, 32), key, value, scaling=1.0))
    assert max(sizes) == 32
    assert sum(sizes) == 2 * 12 * 16


def test_a_row_that_sees_nothing_is_zero():
    key, value = (segments(kind, 2, 0, 2, 5) for kind in ("key", "value"))
    mask = torch.zeros(2, 1, 1, key.shape[2], dtype=torch.bool)
    problem = AttentionProblem(torch.randn(2, 2, 1, 32), key, value, scaling=1.0, mask=mask)
    for name, path in paths():
        assert (path(problem)[0] == 0).all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries_keep_their_dtype_and_accuracy(dtype):
    torch.manual_seed(0)
    key, value = (segments(kind, 4, 3, 8, 5, dtype=dtype) for kind in ("key", "value"))
    query = torch.randn(2, 4, 1, 32, dtype=dtype)
    expected = dense_attention(query, key.read(0, 136, torch.float32), value.read(0, 136, torch.float32), 0.2)
    for name, path in paths():
        got, _ = path(AttentionProblem(query, key, value, scaling=0.2))
        assert got.dtype == dtype
        assert relative_rms(got, expected) < 5e-3, name


def test_misfits_are_refused():
    key, value = (segments(kind, 2, 0, 2, 5) for kind in ("key", "value"))
    with pytest.raises(ValueError, match="do not fit keys"):
        AttentionProblem(torch.randn(2, 3, 1, 32), key, value, scaling=1.0)
    with pytest.raises(ValueError, match="queries but only"):
        AttentionProblem(torch.randn(2, 2, 99, 32), key, value, scaling=1.0)
    with pytest.raises(ValueError, match="differ in batch"):
        AttentionProblem(torch.randn(2, 2, 1, 32), key, segments("value", 2, 0, 1, 5), scaling=1.0)
