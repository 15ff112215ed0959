"""One layer's keys and values in blocks: what an engine's attention layer writes and reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..attend import AttentionProblem
from ..attend.naive import attend as attend_naive
from ..runtime.native import library
from ..segments import Segments
from . import cpu
from .base import BlockTensor

QUERIES_AT_ONCE = 256
"""Queries of a long prompt that attend together: later ones need not be looked at for their tokens."""


@dataclass(frozen=True, eq=False)
class BlockLayer:
    """Keys and values of one layer.

    Attributes:
        keys: in the first bytes of a block.
        values: in the bytes after them.
    """

    keys: BlockTensor
    values: BlockTensor

    @property
    def nbytes(self) -> int:
        """Return the bytes of a block."""
        return self.keys.nbytes + self.values.nbytes

    @cached_property
    def bytes_per_token(self) -> int:
        """Return the bytes of one token of one KV head, rounded up: engines allocate whole ones."""
        return -(-self.nbytes // (self.keys.page * self.keys.kv_heads))

    def parts(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of blocks `[N, bytes]` that are the keys and the values."""
        first = self.keys.nbytes
        return blocks[:, :first], blocks[:, first : self.nbytes]

    def write(self, blocks: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store tokens `[n, H_kv, D]` in `blocks` `[N, bytes]` uint8; see `BlockTensor.write`."""
        of_keys, of_values = self.parts(blocks)
        self.keys.write(of_keys, keys, slots, positions)
        self.values.write(of_values, values, slots, positions)

    def attend(
        self,
        query: Tensor,
        blocks: Tensor,
        table: Tensor,
        lengths: Tensor,
        scaling: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Return the output `[B, H, S, D_v]` of causal attention, in the query's dtype.

        Args:
            query: `[B, H, S, D]`, the last `S` tokens of each sequence.
            blocks: `[N, bytes]` uint8, in which they have been written.
            table: `[B, pages]` int32, the blocks of each sequence; those after its last token count for nothing.
            lengths: `[B]` int64, tokens of each sequence, at least `S`.
            scaling: factor on `q·k`.
            softcap: see `AttentionProblem`.
            sink_logits: see `AttentionProblem`.
        """
        outputs, queries = [], query.shape[2]
        for start in range(0, queries, QUERIES_AT_ONCE):
            some = query[:, :, start : start + QUERIES_AT_ONCE]
            seen = lengths - (queries - start - some.shape[2])
            outputs.append(self._attend(some, blocks, table, seen, scaling, softcap, sink_logits).to(query.dtype))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _attend(
        self,
        query: Tensor,
        blocks: Tensor,
        table: Tensor,
        lengths: Tensor,
        scaling: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        native = library() if query.device.type == "cpu" else None
        keys, values = self.parts(blocks)
        if native is not None:
            scaled = (query.float() * scaling).contiguous()
            logits = None if sink_logits is None else sink_logits.float().contiguous()
            key, value = self.keys.native(keys, table), self.values.native(values, table)
            heads = self.keys.kv_heads
            return cpu.attend(native, scaled, key, value, table, lengths, heads, softcap or 0.0, logits)
        rows = []
        for row, blocks_of_row, length in zip(query, table, lengths.tolist(), strict=True):
            found = blocks_of_row[: -(-length // self.keys.page)]
            read = (self.keys.read(keys, found, torch.float32), self.values.read(values, found, torch.float32))
            one, other = (Segments(None, None, states[None, :, :length]) for states in read)
            rows.append(attend_naive(AttentionProblem(row[None], one, other, scaling, None, softcap, sink_logits))[0])
        return torch.cat(rows)
