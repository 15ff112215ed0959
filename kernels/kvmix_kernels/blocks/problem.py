"""Attention over blocks: the one argument of every way to attend to them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attend.problem import QueryProblem
from .base import BlockTensor


@dataclass(frozen=True, eq=False)
class BlockProblem(QueryProblem):
    """Causal attention of the last `S` tokens of several sequences over all of their tokens.

    Attributes:
        query: `[B, H, S, D]`.
        keys: storage of the keys.
        values: storage of the values.
        key_blocks: `[N, bytes]` uint8, the keys of all blocks.
        value_blocks: `[N, bytes]` uint8, the values.
        table: `[B, pages]` int32, the blocks of each sequence; those after its last token count for nothing.
        lengths: `[B]` int64, tokens of each sequence, at least `S`.
        scaling: factor on `q·k`.
        softcap: see `AttentionProblem`.
        sink_logits: see `AttentionProblem`.
    """

    query: Tensor
    keys: BlockTensor
    values: BlockTensor
    key_blocks: Tensor
    value_blocks: Tensor
    table: Tensor
    lengths: Tensor
    scaling: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        """Number of KV heads, `H_kv`."""
        return self.keys.kv_heads

    @property
    def page(self) -> int:
        """Tokens of a block."""
        return self.keys.page
