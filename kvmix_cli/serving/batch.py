"""One step of an engine: the tokens of several sequences, some of which continue prompts and some of which decode."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from kvmix_kernels.blocks import BlockLayer
from torch import Tensor


@dataclass(frozen=True, eq=False)
class EngineBatch:
    """The tokens of a step, and where they and those before them are.

    Attributes:
        slots: `[n]` int64, where each token goes.
        positions: `[n]` int64, of each token in its sequence.
        table: `[B, pages]` int32, the blocks of each sequence.
        lengths: `[B]` int64, tokens of each sequence, new ones included.
        starts: first new token of each sequence among all, and their number: `B + 1`.
        decoding: `[m]` int64 on the CPU, the sequences with one new token.
    """

    slots: Tensor
    positions: Tensor
    table: Tensor
    lengths: Tensor
    starts: list[int]
    decoding: Tensor

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, table: Tensor, slots: Tensor) -> EngineBatch:
        """Return the batch of a step, on the device of `lengths`.

        Args:
            starts: `[B + 1]` on the CPU, first new token of each sequence among all, and their number.
            lengths: `[B]`, tokens of each sequence, new ones included.
            table: `[B, pages]`.
            slots: `[n]` or more.
        """
        starts, lengths, device = starts.long(), lengths.long(), lengths.device
        counts = starts.diff()
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts).to(device)
        positions = (lengths - starts[1:].to(device))[rows] + torch.arange(len(rows), device=device)
        table = table.int().contiguous()
        decoding = (counts == 1).nonzero()[:, 0]
        return cls(slots[: len(rows)].long(), positions, table, lengths, starts.tolist(), decoding)

    def write(self, layer: BlockLayer, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store the new tokens `[n, H_kv, D]` in `blocks` `[N, bytes]`."""
        layer.write(blocks, keys, values, self.slots, self.positions)

    def attend(
        self,
        layer: BlockLayer,
        blocks: Tensor,
        query: Tensor,
        output: Tensor,
        scaling: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> None:
        """Write the attention of the new tokens `[n, H, D]` to `output` `[n, H, D_v]`.

        Sequences with one new token attend together, others one after the other. `scaling`, `softcap` and
        `sink_logits` are those of `BlockLayer.attend`.
        """
        if len(self.decoding):
            rows, table, lengths = self._decoding
            queries = query[: len(rows)] if len(rows) == len(self.lengths) else query[rows]
            found = layer.attend(queries[:, :, None], blocks, table, lengths, scaling, softcap, sink_logits)
            output[rows] = found[:, :, 0].to(output.dtype)
        for index, (start, stop) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            if stop - start > 1:
                queries = query[start:stop].transpose(0, 1)[None]
                of_one = self.table[index : index + 1], self.lengths[index : index + 1]
                found = layer.attend(queries, blocks, *of_one, scaling, softcap, sink_logits)
                output[start:stop] = found[0].transpose(0, 1).to(output.dtype)

    @cached_property
    def _decoding(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return, of the sequences with one new token, its row among all tokens, their table and lengths."""
        rows = torch.tensor(self.starts)[self.decoding].to(self.lengths.device)
        if len(rows) == len(self.lengths):
            return rows, self.table, self.lengths
        decoding = self.decoding.to(self.lengths.device)
        return rows, self.table[decoding], self.lengths[decoding]
