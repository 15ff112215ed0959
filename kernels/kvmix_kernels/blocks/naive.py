"""Definition of writing into blocks and of attention over them.

To write is to unpack the blocks that are touched, put the tokens in and pack them again; to attend is to read every
sequence's tokens from its blocks and attend to those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attend import AttentionProblem
from ..attend import naive as attending
from ..segments import Segments
from .problem import BlockProblem


def place(
    blocks: Tensor,
    codes: Tensor,
    slots: Tensor,
    page: int,
    unpack: Callable[[Tensor], Tensor],
    pack: Callable[[Tensor], Tensor],
) -> None:
    """Put codes of tokens into blocks.

    Args:
        blocks: `[N, bytes]` uint8, the codes of every block.
        codes: `[n, H_kv, D]` uint8.
        slots: `[n]` int64.
        page: tokens of a block.
        unpack: from bytes `[m, bytes]` to codes `[m, H_kv, page, D]`.
        pack: its inverse.
    """
    touched, which = (slots // page).unique(return_inverse=True)
    held = unpack(blocks[touched])
    held[which, :, slots % page] = codes
    blocks[touched] = pack(held)


def attend(problem: BlockProblem) -> Tensor:
    """Return the output `[B, H, S, D_v]` of causal attention, in the query's dtype."""
    dtype = torch.promote_types(problem.query.dtype, torch.float32)
    rows = []
    for row, blocks, length in zip(problem.query, problem.table, problem.lengths.tolist(), strict=True):
        found = blocks[: -(-length // problem.page)]
        key, value = (
            Segments(None, None, tensor.read(held, found, dtype)[None, :, :length])
            for tensor, held in ((problem.keys, problem.key_blocks), (problem.values, problem.value_blocks))
        )
        of_one = AttentionProblem(row[None], key, value, problem.scaling, None, problem.softcap, problem.sink_logits)
        rows.append(attending.attend(of_one)[0])
    return torch.cat(rows)
