"""Blocks of a serving engine: tokens written one by one in any order, and attention over tables of blocks."""

import pytest
import torch
from coded_pages import basis_of
from in_blocks import DIM, HEADS, LENGTHS, RATIO, Sequences, affine, layer_of
from kvmix_kernels.blocks import AffineBlocks, CodedBlocks
from kvmix_kernels.blocks import affine as affine_blocks
from kvmix_kernels.blocks import coded as coded_blocks
from kvmix_kernels.blocks import layer as layer_blocks
from kvmix_kernels.layout import BITS, PageLayout
from kvmix_kernels.quantize import naive
from kvmix_kernels.runtime.native import library, use_instruction_set
from kvmix_kernels.runtime.native.processor import INSTRUCTION_SETS


def without_library(monkeypatch):
    for module in (affine_blocks, coded_blocks, layer_blocks):
        monkeypatch.setattr(module, "library", lambda: None)


STORAGES = [*map(str, BITS), "coded", "sink", "plain", "mixed"]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("native", [True, False], ids=["native", "naive"])
def test_tokens_are_read_as_they_were_written(storage, native, monkeypatch):
    if not native:
        without_library(monkeypatch)
    held = Sequences(layer_of(storage, 32), 32)
    for row, length in enumerate(LENGTHS.tolist()):
        table = held.table[row, : -(-length // 32)]
        parts = held.layer.parts(held.blocks)
        for tensor, part, expected in (
            (held.layer.keys, parts[0], held.keys[row]),
            (held.layer.values, parts[1], held.values[row]),
        ):
            got = tensor.read(part, table, torch.float32)[:, :length].transpose(0, 1)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # the order of a product's sums


@pytest.mark.parametrize("storage", STORAGES)
def test_the_native_path_writes_what_the_definition_writes(storage, monkeypatch):
    if library() is None:
        pytest.skip("there is no native library")
    native = Sequences(layer_of(storage, 32), 32)
    without_library(monkeypatch)
    wrong = (Sequences(layer_of(storage, 32), 32).blocks != native.blocks).sum()
    coded = storage in ("coded", "sink", "mixed")  # sums are in another order, which moves few codes
    assert wrong <= (1e-3 * native.blocks.numel() if coded else 0)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scales", "encoder"), [("float16", "minmax"), ("bfloat16", "minmax"), ("float16", "refit")])
def test_every_dtype_and_instruction_set_stores_what_the_definition_stores(scales, encoder, dtype, name, monkeypatch):
    """Keys and values are parts of a wider tensor, as those of a joint projection are; one group is shorter."""
    if use_instruction_set(name) != name:
        pytest.skip(f"the processor lacks {name}")
    states = torch.randn(40, HEADS, 2 * DIM, generator=torch.Generator().manual_seed(3)).to(dtype)
    states[3], states[5, 0] = 0.0, 7.5  # a constant group has scale 0
    slots = torch.randperm(96)[:40]
    try:
        for kind, bits, group in (("key", 3, 48), ("value", 3, 48), ("key", 8, 16), ("value", 4, 64)):
            layout = PageLayout("value", bits, DIM, 32, group, scales)
            tensor, written = AffineBlocks(kind, HEADS, layout, encoder), []
            for native in (True, False):
                with monkeypatch.context() as patch:
                    if not native:
                        without_library(patch)
                    written.append(torch.full((3, tensor.nbytes), 0, dtype=torch.uint8))
                    tensor.write(written[-1], states[..., DIM:], slots, slots)
            assert torch.equal(*written), (kind, bits, group)
    finally:
        use_instruction_set()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("queries", "page"), [(1, 128), (1, 32), (5, 32)])
def test_attention_over_blocks_is_attention_over_what_is_read_from_them(storage, queries, page):
    held = Sequences(layer_of(storage, page), page)
    query = torch.randn(len(LENGTHS), HEADS * RATIO, queries, DIM, generator=held.draw)
    expected = held.attended(query)
    for name in INSTRUCTION_SETS:
        try:
            if use_instruction_set(name) != name:
                continue
            got = held.layer.attend(query, held.blocks, held.table, LENGTHS, DIM**-0.5)
        finally:
            use_instruction_set()
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 1e-3, f"{name}: coefficients are rounded to 16 bits, which moves results by about 5e-5"


@pytest.mark.parametrize("storage", ["2", "coded", "plain"])
def test_attention_without_the_library(storage, monkeypatch):
    without_library(monkeypatch)
    held = Sequences(layer_of(storage, 32), 32)
    query = torch.randn(len(LENGTHS), HEADS * RATIO, 5, DIM, generator=held.draw)
    got = held.layer.attend(query, held.blocks, held.table, LENGTHS, DIM**-0.5)
    torch.testing.assert_close(got.double(), held.attended(query), rtol=1e-4, atol=1e-5)  # float32 against float64


def test_long_prompts_attend_in_shares_of_their_queries(monkeypatch):
    held = Sequences(layer_of("4", 32), 32)
    query = torch.randn(len(LENGTHS), HEADS * RATIO, 5, DIM, generator=held.draw)
    whole = held.layer.attend(query, held.blocks, held.table, LENGTHS, DIM**-0.5)
    monkeypatch.setattr(layer_blocks, "QUERIES_AT_ONCE", 2)
    shares = held.layer.attend(query, held.blocks, held.table, LENGTHS, DIM**-0.5)
    torch.testing.assert_close(shares, whole, rtol=0, atol=1e-4)  # coefficients are rounded four rows at a time


def test_soft_cap_and_sink_logits():
    held = Sequences(layer_of("8", 32), 32)
    query = torch.randn(len(LENGTHS), HEADS * RATIO, 1, DIM, generator=held.draw)
    logits = torch.randn(HEADS * RATIO, generator=held.draw)
    got = held.layer.attend(query, held.blocks, held.table, LENGTHS, 0.1, 5.0, logits)
    keys = held.keys[0].repeat_interleave(RATIO, dim=1).double()
    values = held.values[0].repeat_interleave(RATIO, dim=1).double()
    scores = 5.0 * torch.tanh(torch.einsum("hd,thd->ht", query[0, :, 0].double(), keys) * 0.1 / 5.0)
    weights = torch.cat([scores, logits.double()[:, None]], dim=1).softmax(-1)[:, :-1]
    expected = torch.einsum("ht,thd->hd", weights, values)
    torch.testing.assert_close(got[0, :, 0].double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("storage", ["4", "coded", "plain"])
def test_a_token_that_is_not_finite_reaches_no_other_sequence(storage):
    held = Sequences(layer_of(storage, 32), 32)
    bad = torch.full((1, HEADS, DIM), float("nan"))
    after = held.slots[2][-1:] + 1  # behind the last token of the shortest sequence, in its block
    held.layer.write(held.blocks, bad, bad, after, torch.tensor([5]))
    query = torch.randn(len(LENGTHS), HEADS * RATIO, 1, DIM, generator=held.draw)
    got = held.layer.attend(query, held.blocks, held.table, LENGTHS, DIM**-0.5)
    torch.testing.assert_close(got.double(), held.attended(query), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("bits", BITS)
def test_every_token_has_groups_of_its_own(kind, bits):
    """Codes and scales are those of a page of values, whatever else is in the block."""
    tensor = affine(kind, bits, 32, 16)
    states = torch.randn(9, HEADS, DIM)
    one = PageLayout("value", bits, DIM, 16, 16)
    padded = torch.cat([states, torch.zeros(7, HEADS, DIM)]).transpose(0, 1)[:, None]
    expected = naive.dequantize(*naive.quantize(padded, one), one)[:, 0, :9].transpose(0, 1)
    torch.testing.assert_close(tensor.round_trip(states, torch.arange(9)), expected, rtol=0, atol=0)


def test_bytes_are_those_of_codes_and_scales():
    layer = layer_of("3", 128)
    tokens = 128 * HEADS
    assert layer.keys.nbytes == tokens * (DIM * 3 / 8 + 4 * 4)  # four groups of 16, each with two 16-bit numbers
    assert layer.values.nbytes == tokens * (DIM * 3 / 8 + 4)
    assert layer.bytes_per_token == DIM * 3 / 4 + 20
    assert layer_of("plain", 32).bytes_per_token == 2 * DIM * 4


def test_groups_and_blocks_that_cannot_be_packed():
    with pytest.raises(ValueError, match="multiples of 16 channels, got 24"):
        affine("key", 4, 32, 24)
    with pytest.raises(ValueError, match="expected a layout of values"):
        AffineBlocks("key", HEADS, PageLayout("key", 4, DIM, 32))
    with pytest.raises(ValueError, match="at most 1024 tokens, got 2048"):
        CodedBlocks(basis_of("key", ["6543"], DIM, 2048))


def test_the_first_tokens_of_a_sequence_are_read_as_they_are():
    tensor = layer_of("sink", 32).keys
    states, positions = torch.randn(40, HEADS, DIM), torch.arange(40)
    back = tensor.round_trip(states, positions)
    assert torch.equal(back[:6], states[:6]) and not torch.equal(back[6], states[6])
    plain = layer_of("coded", 32).keys
    assert torch.equal(back[6:], plain.round_trip(states, positions)[6:])
    assert tensor.nbytes == plain.nbytes + HEADS * 6 * DIM * 4
    with pytest.raises(ValueError, match="a sink of 33 tokens is longer than a block of 32"):
        CodedBlocks(tensor.basis, 33)
