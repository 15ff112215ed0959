"""One layer's keys and values in blocks: what an engine's attention layer writes and reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..runtime import gpu
from ..runtime.fallback import warn_once
from ..runtime.native import library
from . import cpu, naive
from .base import BlockTensor
from .problem import BlockProblem

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
        for tensor, own, states in ((self.keys, of_keys, keys), (self.values, of_values, values)):
            if not _is_stored_on_gpu(tensor, own, states, slots, positions):
                tensor.write(own, states, slots, positions)

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
        key_blocks, value_blocks = self.parts(blocks)
        for start in range(0, queries, QUERIES_AT_ONCE):
            some = query[:, :, start : start + QUERIES_AT_ONCE]
            problem = BlockProblem(
                query=some,
                keys=self.keys,
                values=self.values,
                key_blocks=key_blocks,
                value_blocks=value_blocks,
                table=table,
                lengths=lengths - (queries - start - some.shape[2]),
                scaling=scaling,
                softcap=softcap,
                sink_logits=sink_logits,
            )
            outputs.append(_attend(problem).to(query.dtype))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _is_stored_on_gpu(tensor: BlockTensor, blocks: Tensor, states: Tensor, slots: Tensor, positions: Tensor) -> bool:
    """Store tokens where a GPU has a kernel for it, and return whether it has."""
    if not gpu.is_usable(states.device):
        return False
    from .triton import coded_store, store

    if store.takes(tensor, states):
        store.store(tensor.kind, tensor.layout, tensor.words(blocks), tensor.by_token(blocks), states, slots)
    elif coded_store.takes(tensor, states):
        coded_store.store(tensor, blocks, states, slots, positions)
    else:
        return False
    return True


def _attend(problem: BlockProblem) -> Tensor:
    """Return the output `[B, H, S, D_v]`, in any dtype."""
    device = problem.query.device
    if gpu.is_usable(device):
        from . import triton

        reason = triton.unsupported(problem)
        if reason is not None:
            warn_once(f"attention over {reason} has no GPU kernel; falling back to slow PyTorch")
        elif triton.is_trusted(problem):
            return triton.attend(problem)
    native = library() if device.type == "cpu" else None
    return naive.attend(problem) if native is None else cpu.attend(native, problem)
