"""Pages of all KV heads in one row, another number of each head's: read and attended to as the dense tokens are."""

import pytest
import torch
from attending import dense, seen
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem, naive
from kvmix_kernels.attend.parts import parts_of
from kvmix_kernels.pages import Packed
from kvmix_kernels.pooled import PooledTokens
from kvmix_kernels.segments import Segments
from poisoned import pooled
from reference import dense_attention_lse

PAGE, HEADS, DIM = 16, 2, 32


def in_full(pages):
    return pooled(torch.tensor(pages), [(None, DIM), (None, DIM)], PAGE)


def test_a_part_is_read_in_place_or_copied():
    """The CPU takes the row and a list of places; a GPU gets copies, of no more pages than the largest head has."""
    pages = torch.tensor([[5, 1], [2, 4]])
    forms = [(PageLayout(kind, 4, DIM, PAGE, 16), DIM) for kind in ("key", "value")]
    key, value = pooled(pages, forms, PAGE)
    tail = torch.randn(2, HEADS, 9, DIM)
    problem = AttentionProblem(torch.randn(2, 4, 1, DIM), Segments(None, key, tail), Segments(None, value, tail), 1.0)
    part = parts_of(problem)[1]
    assert part.tokens == 5 * PAGE
    everything = part.all_pages().key.packed
    assert everything.words.data_ptr() == key.held[0].words.data_ptr()
    assert everything.words.shape[1:3] == (HEADS, 6)
    copy = part.gathered()
    assert isinstance(copy.key.packed, Packed)
    mine = part.mask[:, ::2, 0]
    states = [each.key.read(0, part.tokens, torch.float32)[mine] for each in (part, copy)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_what_keeps_all_tokens_can_be_read():
    states = torch.randn(2, 1, 4 * PAGE, DIM)
    heads = torch.tensor([[[0, 0, 1, 1]], [[1, 0, 1, 0]]], dtype=torch.int16)
    every = PooledTokens(torch.zeros(2, HEADS, 2 * PAGE, dtype=torch.uint8), (states,), heads, PAGE)
    expected = torch.stack(
        [states[0, 0].view(2, -1, DIM), states[1, 0].view(4, PAGE, DIM)[[1, 3, 0, 2]].view(2, -1, DIM)]
    )
    torch.testing.assert_close(every.read(3, 20, torch.float32), expected[:, :, 3:20], rtol=0, atol=0)
    some, _ = in_full([[1, 1], [2, 0]])
    with pytest.raises(ValueError, match="tokens have been evicted"):
        some.read(0, 1, torch.float32)


def test_the_definition_reads_full_precision_in_float64():
    key, value = in_full([[4, 0], [1, 3]])
    tail = torch.randn(2, HEADS, 5, DIM, dtype=torch.float64)
    keys, values = Segments(None, key, tail), Segments(None, value, tail)
    query = torch.randn(2, HEADS, 5, DIM, dtype=torch.float64)
    expected, _ = dense_attention_lse(query, dense(keys), dense(values), 1.0, seen(query, keys, None), None, None)
    torch.testing.assert_close(naive.attend(AttentionProblem(query, keys, values, 1.0))[0], expected)
