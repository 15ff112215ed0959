"""Sequences in the blocks of a serving engine, and layers of every kind of storage."""

import torch
from coded_pages import basis_of
from kvmix_kernels.blocks import AffineBlocks, BlockLayer, CodedBlocks, PlainBlocks
from kvmix_kernels.layout import PageLayout
from reference import dense_attention

HEADS, DIM, RATIO = 2, 64, 3
LENGTHS = torch.tensor([70, 33, 5])


def affine(kind, bits, page, group=None):
    return AffineBlocks(kind, HEADS, PageLayout("value", bits, DIM, page, group))


def layer_of(name, page):
    """A layer of each kind of storage, keys and values apart."""
    if name == "coded":
        keys = basis_of("key", ["6543", "3322"], DIM, page, frame=page)
        return BlockLayer(CodedBlocks(keys), CodedBlocks(basis_of("value", ["5510", "4100"], DIM, page)))
    if name == "sink":  # longer than one of the sequences
        bases = basis_of("key", ["6543", "3322"], DIM, page, frame=page), basis_of("value", ["5510", "4100"], DIM, page)
        return BlockLayer(*(CodedBlocks(basis, 6, torch.float32) for basis in bases))
    if name == "plain":
        return BlockLayer(*(PlainBlocks(kind, HEADS, DIM, page, torch.float32) for kind in ("key", "value")))
    if name == "mixed":
        return BlockLayer(affine("key", 3, page, 48), CodedBlocks(basis_of("value", ["5510", "4100"], DIM, page)))
    bits = int(name)
    return BlockLayer(affine("key", bits, page, 16), affine("value", bits, page))


class Sequences:
    """Sequences of some tokens in blocks in a random order, written in two shares of tokens in a random order."""

    def __init__(self, layer, page, seed=0, lengths=LENGTHS, dtype=torch.float32):
        draw = torch.Generator().manual_seed(seed)
        pages = [-(-length // page) for length in lengths.tolist()]
        blocks = torch.randperm(sum(pages) + 2, generator=draw)
        self.layer, self.page, self.lengths = layer, page, lengths
        self.blocks = torch.full((len(blocks), layer.nbytes + 32), 255, dtype=torch.uint8)  # as floats: NaN
        self.blocks[blocks[:-2], : layer.nbytes] = 0
        self.table = torch.full((len(pages), max(pages) + 1), -7, dtype=torch.int32)  # nothing reads what is not there
        self.keys, self.values, self.slots = [], [], []
        for row, length in enumerate(lengths.tolist()):
            first = sum(pages[:row])
            self.table[row, : pages[row]] = blocks[first : first + pages[row]].int()
            positions = torch.arange(length)
            slots = self.table[row].long()[positions // page] * page + positions % page
            keys, values = torch.randn(2, length, layer.keys.kv_heads, layer.keys.head_dim, generator=draw).to(dtype)
            order = torch.randperm(length, generator=draw)
            for some in order.tensor_split(2):
                layer.write(self.blocks, keys[some], values[some], slots[some], positions[some])
            self.keys.append(layer.keys.round_trip(keys, positions))
            self.values.append(layer.values.round_trip(values, positions))
            self.slots.append(slots)
        self.draw = draw

    def attended(self, query, softcap=None, sink_logits=None):
        """The definition, over the tokens as they are read back: one dense softmax in float64."""
        rows = []
        for row, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            length, queries = len(keys), query.shape[2]
            mask = torch.zeros(queries, length).masked_fill_(
                torch.arange(length) > torch.arange(length - queries, length)[:, None], -torch.inf
            )
            states = (each.transpose(0, 1)[None] for each in (keys, values))
            scaling = query.shape[3] ** -0.5
            rows.append(dense_attention(query[row][None], *states, scaling, mask, softcap, sink_logits))
        return torch.cat(rows)
