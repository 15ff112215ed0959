"""Definition of writing into blocks: unpack the blocks that are touched, put the tokens in, pack them again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


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
