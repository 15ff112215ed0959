"""Trials of attention over blocks: random sequences in blocks against the definition in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ...attend.triton.coded_trial import MOST_QUERIES, difference, random_basis
from ...layout import FULL_PRECISION_BITS, Kind, PageLayout
from ...runtime import trial
from .. import naive
from ..affine import AffineBlocks
from ..base import BlockTensor
from ..coded import CodedBlocks
from ..plain import PlainBlocks
from ..problem import BlockProblem
from .launch import attend, value_layout

KV_HEADS, PAGES, MISSING = 2, 3, 20
"""Of a trial: KV heads, blocks of the longest sequence, and tokens that its last block lacks."""


@dataclass(frozen=True)
class BlockKind:
    """A kind of attention over blocks: everything that Triton compiles by itself.

    Attributes:
        device: the GPU.
        dtypes: of queries, and of keys and values in full precision.
        page: tokens of a block.
        sink: of transform codes, the first tokens that are in full precision; None where there are no such codes.
        keys: layout of a page of values with the keys' bits and groups; None for full precision.
        values: their layout, None for full precision.
        dims: channels of keys and of values.
        ratio: query heads to a KV head.
        queries: a power of two, at most `MOST_QUERIES`.
        softcap: whether there is one.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]
    page: int
    sink: int | None
    keys: PageLayout | None
    values: PageLayout | None
    dims: tuple[int, int]
    ratio: int
    queries: int
    softcap: bool

    def __str__(self) -> str:
        keys, values = (FULL_PRECISION_BITS if each is None else each.bits for each in (self.keys, self.values))
        heads = f"{self.ratio} query heads of {self.dims[0]} channels to a KV head, blocks of {self.page}"
        codes = f"K{keys} V{values}" if self.sink is None else f"transform codes and a sink of {self.sink}"
        return f"{codes} ({heads}, {self.dtypes[0]})".replace("torch.", "")


def is_trusted(problem: BlockProblem) -> bool:
    """Return whether the kernel gets this right, as far as a trial can tell; if not, one warning names it."""
    return not trial.is_due() or passes(_kind_of(problem))


@functools.cache
def passes(kind: BlockKind) -> bool:
    """Return whether attention of this kind agrees with the definition; if not, one warning names it."""
    return trial.passes(f"attention over blocks, {kind}", functools.partial(_failure, kind))


def _kind_of(problem: BlockProblem) -> BlockKind:
    tensors = problem.keys, problem.values
    plain = [each.dtype for each in tensors if isinstance(each, PlainBlocks | CodedBlocks)]
    return BlockKind(
        problem.query.device,
        (problem.query.dtype, plain[0] if plain else problem.query.dtype),
        problem.page,
        next((each.sink for each in tensors if isinstance(each, CodedBlocks)), None),
        value_layout(problem.keys),
        value_layout(problem.values),
        (problem.keys.head_dim, problem.values.head_dim),
        problem.ratio,
        min(MOST_QUERIES, int(triton.next_power_of_2(problem.queries))),
        problem.softcap is not None,
    )


def _failure(kind: BlockKind) -> str | None:
    generator = torch.Generator().manual_seed(trial.SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kind.device, kind.dtypes[0])

    lengths = [PAGES * kind.page - MISSING, kind.page + kind.queries]
    table = torch.tensor([[4, 0, 2], [1, 3, 0]], dtype=torch.int32, device=kind.device)
    keys, values = _storage(kind, "key", kind.keys, generator), _storage(kind, "value", kind.values, generator)
    rooms = []
    for tensor in (keys, values):
        rooms.append(torch.zeros(table.numel(), tensor.nbytes, dtype=torch.uint8, device=kind.device))
        for row, length in zip(table, lengths, strict=True):
            positions = torch.arange(length, device=kind.device)
            slots = row.long()[positions // kind.page] * kind.page + positions % kind.page
            tensor.write(rooms[-1], random(length, KV_HEADS, tensor.head_dim), slots, positions)
    problem = BlockProblem(
        query=random(len(lengths), kind.ratio * KV_HEADS, kind.queries, kind.dims[0]),
        keys=keys,
        values=values,
        key_blocks=rooms[0],
        value_blocks=rooms[1],
        table=table,
        lengths=torch.tensor(lengths, device=kind.device),
        scaling=0.5 * kind.dims[0] ** -0.5,  # random keys at 1 bit are long
        softcap=20.0 if kind.softcap else None,
    )
    expected = naive.attend(replace(problem, query=problem.query.double()))
    return difference((attend(problem),), (expected,))


def _storage(kind: BlockKind, of: Kind, layout: PageLayout | None, draw: torch.Generator) -> BlockTensor:
    if kind.sink is not None:
        basis = random_basis(of, kind.dims[of == "value"], kind.page, kind.device, draw)
        return CodedBlocks(basis, kind.sink, kind.dtypes[1])
    if layout is None:
        return PlainBlocks(of, KV_HEADS, kind.dims[of == "value"], kind.page, kind.dtypes[1])
    return AffineBlocks(of, KV_HEADS, layout)
