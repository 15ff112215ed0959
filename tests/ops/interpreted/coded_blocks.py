"""Blocks of transform codes: attention against one dense float64 softmax over what they hold, and storing in them."""

import pytest
import torch
from attending import GPU_RMS, relative_rms
from coded_pages import basis_of
from in_blocks import Sequences, layer_of
from kvmix_kernels.attend.triton.coded_launch import LEAST_TILE
from kvmix_kernels.blocks import BlockLayer, CodedBlocks
from kvmix_kernels.blocks.base import GPU_FRAME
from kvmix_kernels.blocks.problem import BlockProblem
from kvmix_kernels.blocks.triton import attend, coded_launch, coded_store, is_trusted, unsupported
from kvmix_kernels.runtime import gpu
from kvmix_kernels.transform import TransformBasis
from kvmix_kernels.transform import naive as definition
from poisoned import splits_of

CPU = torch.device("cpu")


def layer(menus, page=64, dim=32, frame=None, sink=0, dtype=torch.float32):
    """Keys and values of one layer; `menus` have the widths of the quarters of each KV head, of both."""
    keys, values = (
        basis_of(kind, menu, dim, page, frame if kind == "key" else None)
        for kind, menu in zip(("key", "value"), menus, strict=True)
    )
    return BlockLayer(CodedBlocks(keys, sink, dtype), CodedBlocks(values, sink, dtype))


def problem_of(held, query, softcap=None, logits=None):
    """Attention over sequences in blocks."""
    tensors = held.layer.keys, held.layer.values
    parts = held.layer.parts(held.blocks)
    return BlockProblem(query, *tensors, *parts, held.table, held.lengths, query.shape[3] ** -0.5, softcap, logits)


CASES = {
    "decoding": {"menus": (["6543", "3322"], ["5510", "4100"]), "frame": 128, "lengths": [150, 33], "split": 128},
    "a chunk of a prompt, with a sink": {"menus": (["6300"], ["6543"]), "lengths": [70, 5], "queries": 5, "sink": 6},
    "directions without bits": {"menus": (["0000", "1111"], ["4100", "0000"]), "lengths": [70], "sink": 1},
    "blocks of a tile": {
        "menus": (["5510"], ["3322"]), "page": 128, "frame": 128, "lengths": [300], "ratio": 4, "split": 128,
        "softcap": 1.5, "logits": True, "sink": 1,
    },
    "blocks of 256, in halves": {
        "menus": (["6543"], ["6666"]), "page": 256, "dim": 64, "frame": 256, "lengths": [270], "sink": 1,
        "dtype": torch.bfloat16,
    },
    "many rows": {"menus": (["3322"], ["1111"]), "lengths": [40], "queries": 12, "ratio": 4},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_dense_attention(case):
    options = {"queries": 1, "ratio": 3, "softcap": None, "logits": False, "split": 1024, "dtype": torch.float32}
    options |= CASES[case]
    queries, ratio, logits, split, lengths = (
        options.pop(name) for name in ("queries", "ratio", "logits", "split", "lengths")
    )
    softcap, dtype = options.pop("softcap"), options["dtype"]
    made = layer(**options)
    held = Sequences(made, made.keys.page, 1, torch.tensor(lengths), dtype)
    heads, dim = made.keys.kv_heads * ratio, made.keys.head_dim
    query = torch.randn(len(lengths), queries, heads, dim, generator=held.draw).to(dtype).transpose(1, 2)
    sinks = torch.randn(heads, generator=held.draw) if logits else None
    problem = problem_of(held, query, softcap, sinks)
    assert unsupported(problem) is None
    with splits_of(split):
        got = attend(problem)
    assert got.dtype == dtype
    assert relative_rms(got, held.attended(query, softcap, sinks)) < GPU_RMS


def test_sequences_share_blocks_and_long_prompts_attend_in_shares(monkeypatch):
    """Two sequences begin with the same block; then one has more queries than may be in memory at once."""
    held = Sequences(layer((["4100"], ["3322"]), sink=1), 64, lengths=torch.tensor([100, 90]))
    held.table[1, :1] = held.table[0, :1]
    for of_both in (held.keys, held.values):
        of_both[1] = torch.cat([of_both[0][:64], of_both[1][64:]])
    query = torch.randn(2, 2, 3, 32, generator=held.draw)
    problem, expected = problem_of(held, query), held.attended(query)
    assert relative_rms(attend(problem), expected) < GPU_RMS
    monkeypatch.setattr(coded_launch, "MOST_WEIGHTS", 2 * 2 * 192)
    assert len(list(coded_launch._shares(problem))) == 4
    assert relative_rms(attend(problem), expected) < GPU_RMS


@pytest.mark.parametrize(
    ("kind", "menu", "page", "dim", "sink", "dtype"),
    [
        ("key", ["6543", "3322", "0000"], 64, 64, 0, torch.float32),
        ("value", ["6543", "5510", "0000"], 64, 40, 2, torch.bfloat16),
        ("key", ["4100"], 128, 32, 3, torch.float16),
        ("value", ["6666", "6300"], 64, 64, 0, torch.float32),
    ],
)
def test_stores_what_a_cpu_stores_but_for_ties_and_nothing_else(kind, menu, page, dim, sink, dtype):
    """Tokens are those of a joint projection, in several frames, and blocks are full of something.

    Sums are in another order than on a CPU, so a code whose number is at the boundary of two may be the other one.
    """
    basis = basis_of(kind, menu, dim, page, frame=2 * page if kind == "key" else None)
    tensor, draw = CodedBlocks(basis, sink, torch.float32), torch.Generator().manual_seed(page)
    states = torch.randn(14, len(menu), 2 * dim, generator=draw).to(dtype)[..., dim:]
    slots, positions = torch.randperm(3 * page, generator=draw)[:14], torch.randperm(14, generator=draw) * 25
    expected = torch.randint(256, (3, tensor.nbytes + 8), dtype=torch.uint8, generator=draw)
    got, before = expected.clone(), expected.clone()
    own = got[:, : tensor.nbytes]
    assert not coded_store.takes(tensor, states.double())
    tensor.write(expected[:, : tensor.nbytes], states, slots, positions)
    coded_store.store(tensor, own, states, slots, positions)
    assert coded_store.difference(tensor, own, expected[:, : tensor.nbytes], slots) is None
    is_other = torch.ones(3, page, dtype=torch.bool)
    is_other[slots // page, slots % page] = False
    unpacked = [definition.unpack(tensor.codes(each)[None, None], basis)[0].transpose(0, 1) for each in (got, before)]
    others = [each.transpose(1, 2)[is_other] for each in unpacked]
    assert torch.equal(*others)
    if kind == "value":
        assert torch.equal(*(tensor.scales(each).view(torch.int16).mT[is_other] for each in (own, before)))
    assert torch.equal(got[:, tensor.nbytes :], before[:, tensor.nbytes :])
    stored = unpacked[0][slots // page, :, slots % page]
    assert (stored != of_float64(basis, states, tensor.frames_of(positions))).float().mean() < 1e-3


def of_float64(basis, states, frames):
    """Codes of tokens `[n, H_kv, D]` by definition, with arithmetic in float64."""
    parts = (each.double() for each in (basis.encoder, basis.decoder, basis.mean, basis.deviation))
    exact = TransformBasis(basis.layout, *parts, basis.frames)
    pages = states.double().transpose(0, 1)[None, :, :, None]
    codes = definition.code(definition.project_tokens(pages, exact, frames), exact)[0]
    return codes[0, :, :, 0].transpose(0, 1)


def test_a_token_that_is_not_finite_leaves_numbers():
    tensor = layer((["4100"], ["3322"])).values
    states = torch.randn(3, 1, 32)
    states[0, 0, 3], states[1, 0, 5] = torch.nan, torch.inf
    blocks = torch.zeros(1, tensor.nbytes, dtype=torch.uint8)
    coded_store.store(tensor, blocks, states, torch.arange(3), torch.arange(3))
    coded_store.store(tensor, blocks, states[:0], torch.arange(0), torch.arange(0))
    read = tensor.read(blocks, torch.tensor([0]), torch.float32)
    assert read.isfinite().all()
    torch.testing.assert_close(read[:, 2], tensor.round_trip(states[2:], torch.arange(2, 3))[0])


def test_frames_are_whole_tiles():
    assert GPU_FRAME == LEAST_TILE


def test_what_has_no_kernel_is_named():
    coded, other = layer((["4100"], ["3322"])), layer((["4100"], ["3322"]), sink=1)
    wide = layer((["4100"], ["3322"]), dim=32, frame=64)
    for held, change, complaint in (
        (wide, {}, "frames of 64 tokens"),
        (layer_of("mixed", 64), {}, "transform codes of keys or values alone"),
        (layer_of("coded", 32), {}, "blocks of 32 tokens"),
        (BlockLayer(coded.keys, other.values), {}, "a sink of 0 keys and 1 values"),
        (coded, {"apart": 4}, f"blocks of transform codes that are {coded.nbytes + 4} bytes apart"),
    ):
        query = torch.randn(1, held.keys.kv_heads, 1, held.keys.head_dim)
        blocks = torch.zeros(1, held.nbytes + change.get("apart", 0), dtype=torch.uint8)
        table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([5])
        problem = BlockProblem(query, held.keys, held.values, *held.parts(blocks), table, lengths, 1.0)
        assert unsupported(problem) == complaint


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_layer_stores_and_attends_with_the_kernels_where_there_is_a_gpu(monkeypatch):
    """The kernels are tried first; then a wrong one is found."""
    monkeypatch.setattr(gpu, "is_usable", lambda device: True)
    monkeypatch.setattr(coded_store, "TRIAL_TOKENS", 6)
    held = Sequences(layer((["4100"], ["3322"]), sink=1), 64, lengths=torch.tensor([9, 5]))
    query = torch.randn(2, 2, 1, 32, generator=held.draw)
    assert is_trusted(problem_of(held, query))
    got = held.layer.attend(query, held.blocks, held.table, held.lengths, 32**-0.5)
    assert relative_rms(got, held.attended(query)) < GPU_RMS
    kind = "key", 32, 64, 1, torch.float32, torch.float32
    assert coded_store.passes.cache_info().currsize >= 2
    coded_store.passes.cache_clear()
    right = coded_store.store
    monkeypatch.setattr(coded_store, "store", lambda *each: right(*each[:3], each[3] ^ 1, each[4]))
    with pytest.warns(UserWarning, match="storing keys as codes of 32 directions in blocks of 64 from float32 fails"):
        assert not coded_store.passes(CPU, *kind)
