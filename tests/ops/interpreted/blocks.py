"""The kernel for attention over the blocks of an engine, against one dense float64 softmax over what they hold."""

import pytest
import torch
from attending import GPU_RMS, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from in_blocks import Sequences, layer_of
from kvmix_kernels import BITS
from kvmix_kernels.blocks import AffineBlocks, BlockLayer, PlainBlocks
from kvmix_kernels.blocks.problem import BlockProblem
from kvmix_kernels.blocks.triton import attend, is_trusted, store, unsupported
from kvmix_kernels.layout import PageLayout
from kvmix_kernels.runtime import gpu
from poisoned import splits_of

HEADS = 2

widths = st.sampled_from([*BITS, 16])


def layer(k_bits, v_bits, dim, page, groups, dtype=torch.float32, scales="float16"):
    """Keys and values of one layer; 16 bits are full precision."""
    made = []
    for kind, bits, group in zip(("key", "value"), (k_bits, v_bits), groups, strict=True):
        plain = PlainBlocks(kind, HEADS, dim, page, dtype)
        layout = PageLayout("value", min(bits, 8), dim, page, group, scales)
        made.append(plain if bits == 16 else AffineBlocks(kind, HEADS, layout))
    return BlockLayer(*made)


def problem_of(held, query, scaling, softcap=None, logits=None):
    """Attention over sequences in blocks."""
    parts = held.layer.parts(held.blocks)
    tensors = held.layer.keys, held.layer.values
    return BlockProblem(query, *tensors, *parts, held.table, held.lengths, scaling, softcap, logits)


@given(
    k_bits=widths,
    v_bits=widths,
    page=st.sampled_from([64, 128, 256]),
    groups=st.tuples(st.sampled_from([16, 32, 48, None]), st.sampled_from([32, 48, None])),
    dim=st.sampled_from([64, 80, 128]),
    rows=st.sampled_from([(1, 1), (1, 3), (1, 7), (5, 4), (33, 1)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    scales=st.sampled_from(["float16", "bfloat16"]),
    softcap=st.sampled_from([None, 1.5]),
    logits=st.booleans(),
    split=st.sampled_from([64, 1024]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=4, deadline=None)
def test_equals_dense_attention(
    k_bits, v_bits, page, groups, dim, rows, dtype, scales, softcap, logits, split, seed,
):  # fmt: skip
    queries, ratio = rows
    lengths = torch.tensor([page + 40, max(queries, 5), 2 * page])
    held = Sequences(layer(k_bits, v_bits, dim, page, groups, dtype, scales), page, seed, lengths, dtype)
    query = torch.randn(len(lengths), queries, HEADS * ratio, dim, generator=held.draw).to(dtype).transpose(1, 2)
    sinks = torch.randn(HEADS * ratio, generator=held.draw) if logits else None
    problem = problem_of(held, query, dim**-0.5, softcap, sinks)
    assert unsupported(problem) is None
    with splits_of(split):
        got = attend(problem)
    assert got.dtype == dtype
    assert relative_rms(got, held.attended(query, softcap, sinks)) < GPU_RMS


def test_sequences_that_share_blocks_and_tables_wider_than_they_need():
    held = Sequences(layer_of("4", 64), 64, lengths=torch.tensor([150, 150, 64]))
    held.table[1, :2] = held.table[0, :2]  # a common prefix of two blocks
    for of_both in (held.keys, held.values):
        of_both[1] = torch.cat([of_both[0][:128], of_both[1][128:]])
    query = torch.randn(3, 6, 1, 64, generator=held.draw)
    with splits_of(64):
        got = attend(problem_of(held, query, 0.125))
    assert relative_rms(got, held.attended(query)) < GPU_RMS


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize(
    ("bits", "group", "dtype", "scales"),
    [
        (1, 16, torch.float32, "float16"),
        (2, 48, torch.bfloat16, "float16"),
        (3, 48, torch.float16, "bfloat16"),
        (4, None, torch.float32, "float16"),
        (8, 32, torch.bfloat16, "float16"),
    ],
)
def test_stores_what_the_definition_stores_and_nothing_else(kind, bits, group, dtype, scales):
    """Tokens are those of a joint projection; one is constant, one not finite, and blocks are full of something."""
    layout = PageLayout("value", bits, 64, 64, group, scales)
    tensor, draw = AffineBlocks(kind, HEADS, layout), torch.Generator().manual_seed(bits)
    states = torch.randn(14, HEADS, 128, generator=draw).to(dtype)[..., 64:]
    states[3], states[5, 0] = 0.0, 7.5
    slots = torch.randperm(3 * 64, generator=draw)[:14]
    expected = torch.randint(256, (3, tensor.nbytes + 8), dtype=torch.uint8, generator=draw)
    got = expected.clone()
    tensor.write_plainly(expected[:, : tensor.nbytes], states, slots)
    own = got[:, : tensor.nbytes]
    store.store(kind, layout, tensor.words(own), tensor.by_token(own), states, slots)
    assert torch.equal(got, expected)
    states[7, 1, 3], states[8, 0, 5] = torch.nan, torch.inf
    store.store(kind, layout, tensor.words(own), tensor.by_token(own), states[7:9], slots[7:9])
    of_tokens = tensor.by_token(own)[slots[7:9] // 64, ..., slots[7:9] % 64]
    assert of_tokens.isfinite().all()


def test_a_trial_of_storing_passes_and_finds_another_kernel_wrong(monkeypatch):
    """Tokens of a wrong block are found."""
    layout = PageLayout("value", 3, 64, 64, 48)
    assert store.passes(torch.device("cpu"), "value", layout, torch.float32)
    right = store.store
    monkeypatch.setattr(store, "store", lambda *operands: right(*operands[:-1], operands[-1] ^ 1))
    with pytest.warns(UserWarning, match="storing keys of 3 bits in groups of 48 from float32 fails its trial"):
        assert not store.passes(torch.device("cpu"), "key", layout, torch.float32)


@pytest.mark.parametrize(
    ("held", "change", "complaint"),
    [
        (layer_of("4", 32), {}, "blocks of 32 tokens"),
        (layer_of("4", 96), {}, "blocks of 96 tokens"),
        (layer(2, 2, 512, 64, (None, None)), {}, "heads of 512 channels"),
        (layer(2, 2, 256, 64, (16, None)), {}, "keys in groups of 16"),
        (layer_of("4", 64), {"dtype": torch.float64}, "float64 queries"),
    ],
)
def test_what_has_no_kernel_is_named(held, change, complaint):
    query = torch.randn(1, HEADS, 1, held.keys.head_dim).to(**change)
    blocks, table = torch.zeros(1, held.nbytes, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)
    problem = BlockProblem(query, held.keys, held.values, *held.parts(blocks), table, torch.tensor([5]), 1.0)
    assert unsupported(problem) == complaint


def test_a_layer_attends_with_the_kernel_where_there_is_a_gpu(monkeypatch):
    mixed = Sequences(layer_of("mixed", 64), 64)
    monkeypatch.setenv("KVMIX_TRITON", "1")
    monkeypatch.setattr(gpu, "is_usable", lambda device: True)
    held = Sequences(layer(4, 2, 64, 64, (32, None)), 64)
    query = torch.randn(3, 2 * HEADS, 1, 64, generator=held.draw)
    operands = held.blocks, held.table, held.lengths, 0.125
    got = held.layer.attend(query, *operands)
    assert torch.equal(got, attend(problem_of(held, query, 0.125)))
    with pytest.warns(UserWarning, match="attention over transform codes of keys or values alone has no GPU kernel"):
        mixed.layer.attend(query, mixed.blocks, mixed.table, mixed.lengths, 0.125)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("k_bits", "v_bits", "softcap"), [(3, 2, None), (16, 4, 1.5)])
def test_trials_pass(k_bits, v_bits, softcap):
    held = Sequences(layer(k_bits, v_bits, 64, 64, (32, None)), 64)
    problem = problem_of(held, torch.randn(3, 2 * HEADS, 2, 64), 0.125, softcap)
    assert is_trusted(problem)
