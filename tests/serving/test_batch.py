"""A step of an engine: sequences that decode and sequences that read prompts, in one batch."""

import pytest
import torch
from kvmix_kernels.blocks import AffineBlocks, BlockLayer
from kvmix_kernels.layout import PageLayout
from torch.nn.functional import scaled_dot_product_attention

from kvmix_cli.serving.batch import EngineBatch

PAGE, HEADS, DIM, RATIO = 32, 2, 32, 2


def layer():
    layout = PageLayout("value", 8, DIM, PAGE)
    return BlockLayer(AffineBlocks("key", HEADS, layout), AffineBlocks("value", HEADS, layout))


def steps(counts):
    """(lengths before, new tokens) of each step; a sequence whose turn it is not has none."""
    lengths = [0] * len(counts[0])
    for step in counts:
        yield list(lengths), step
        lengths = [length + new for length, new in zip(lengths, step, strict=True)]


@pytest.mark.parametrize(
    "counts",
    [
        [(40, 7, 33), (1, 1, 1)],  # all decode
        [(40, 7, 1), (1, 30, 1), (1, 1, 20)],  # some decode
        [(40, 7, 33), (5, 1, 60)],
    ],
)
def test_every_token_attends_to_its_own_sequence(counts):
    draw = torch.Generator().manual_seed(0)
    held, sequences = layer(), len(counts[0])
    pages = 4
    table = torch.randperm(sequences * pages, generator=draw).view(sequences, pages).int()
    blocks = torch.zeros(sequences * pages, held.nbytes, dtype=torch.uint8)
    total = [sum(step[row] for step in counts) for row in range(sequences)]
    states = [torch.randn(3, length, RATIO * HEADS, DIM, generator=draw) for length in total]
    for before, new in steps(counts):
        spans = [slice(start, start + count) for start, count in zip(before, new, strict=True)]
        new_states = [each[:, span] for each, span in zip(states, spans, strict=True)]
        query, keys, values = torch.cat(new_states, dim=1)
        positions = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        row = torch.repeat_interleave(torch.arange(sequences), torch.tensor(new))
        slots = table[row, positions // PAGE].long() * PAGE + positions % PAGE
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
        lengths = torch.tensor([span.stop for span in spans], dtype=torch.int32)
        padded = torch.cat([slots, torch.full((3,), -1)])
        batch = EngineBatch.of(starts, lengths, table, padded)
        assert torch.equal(batch.positions, positions)
        batch.write(held, blocks, keys[:, :HEADS], values[:, :HEADS])
        output = torch.empty_like(query)
        batch.attend(held, blocks, query, output, DIM**-0.5)
        for index, span in enumerate(spans):
            seen = states[index][:, : span.stop]
            mask = torch.arange(span.stop) <= torch.arange(span.start, span.stop)[:, None]
            q, k, v = (each.transpose(0, 1)[None] for each in (seen[0, span], seen[1, :, :HEADS], seen[2, :, :HEADS]))
            expected = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)
            got = output[starts[index] : starts[index + 1]]
            assert (got - expected).norm() / expected.norm() < 0.02, "8 bits"
