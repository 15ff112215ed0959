"""Blocks of a serving engine on a GPU: what is stored there, and attention to it, by the Triton kernels."""

import pytest
import torch
from attending import GPU_RMS, relative_rms
from coded_pages import basis_of
from in_blocks import HEADS, RATIO, Sequences
from kvmix_kernels import PageLayout
from kvmix_kernels.blocks import AffineBlocks, BlockLayer, CodedBlocks, PlainBlocks
from kvmix_kernels.transform import Frames, TransformBasis

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICE = torch.device("cuda")
PAGE, DIM = 128, 128
LENGTHS = torch.tensor([700, 330, 40])
DIFFERENT = 1e-3
"""Share of bytes of codes that may be other ones: those of codes at ties, since sums are in another order."""


def affine(kind, bits, device):
    return AffineBlocks(kind, HEADS, PageLayout("value", bits, DIM, PAGE, 64))


def plain(kind, bits, device):
    return PlainBlocks(kind, HEADS, DIM, PAGE, torch.bfloat16)


def coded(kind, sink, device):
    """Transform codes with directions of every width, none among them."""
    menu = ["6543", "3322"] if kind == "key" else ["5510", "0000"]
    basis = basis_of(kind, menu, DIM, PAGE, frame=256 if kind == "key" else None)
    parts = (each.to(device) for each in (basis.encoder, basis.decoder, basis.mean, basis.deviation))
    frames = basis.frames
    if frames is not None:
        frames = Frames(frames.length, frames.frequencies.to(device), frames.start, frames.interleaved)
    return CodedBlocks(TransformBasis(basis.layout, *parts, frames), sink, torch.bfloat16)


STORAGES = [(plain, 16), *((affine, bits) for bits in (1, 2, 3, 4, 8)), (coded, 0), (coded, 1), (coded, 6)]


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize(("make", "setting"), STORAGES)
def test_blocks_are_written_and_attended_to_as_on_a_cpu(make, setting, queries):
    here, there = (
        BlockLayer(*(make(kind, setting, device) for kind in ("key", "value"))) for device in ("cpu", DEVICE)
    )
    held = Sequences(here, PAGE, lengths=LENGTHS, dtype=torch.bfloat16)
    blocks, table, lengths = (each.to(DEVICE) for each in (held.blocks, held.table, held.lengths))
    query = torch.randn(len(LENGTHS), HEADS * RATIO, queries, DIM, generator=held.draw).bfloat16()
    got = there.attend(query.to(DEVICE), blocks, table, lengths, DIM**-0.5)
    assert relative_rms(got.cpu(), held.attended(query)) < GPU_RMS
    keys, values = torch.randn(2, 300, HEADS, DIM, generator=held.draw).bfloat16()
    slots, positions = torch.randperm(4 * PAGE, generator=held.draw)[:300], torch.arange(300)
    here.write(held.blocks, keys, values, slots, positions)
    there.write(blocks, *(each.to(DEVICE) for each in (keys, values, slots, positions)))
    different = (blocks.cpu() != held.blocks).float().mean()
    assert different <= (DIFFERENT if make is coded else 0)


def test_nothing_waits_for_the_gpu():
    layer = BlockLayer(*(coded(kind, 1, DEVICE) for kind in ("key", "value")))
    blocks = torch.zeros(4, layer.nbytes, dtype=torch.uint8, device=DEVICE)
    states, query = torch.randn(6, HEADS, DIM, device=DEVICE), torch.randn(1, HEADS * RATIO, 1, DIM, device=DEVICE)
    slots, table = torch.arange(6, device=DEVICE), torch.arange(2, dtype=torch.int32, device=DEVICE)[None]
    lengths = torch.tensor([6], device=DEVICE)

    def step():
        layer.write(blocks, states, states, slots, slots)
        layer.attend(query, blocks, table, lengths, 0.1)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
