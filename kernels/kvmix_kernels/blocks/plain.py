"""Blocks of keys or values in the model's own dtype.

Keys lie as `[H_kv, head_dim, page]`, values as `[H_kv, page, head_dim]`: what is contracted comes first.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..layout import FULL_PRECISION_BITS, Kind
from ..runtime.native.structs import DTYPES, CRun, CSegments
from .base import BlockTensor


class PlainBlocks(BlockTensor):
    """Keys or values that are not quantized.

    Args:
        kind: `"key"` or `"value"`.
        kv_heads: number of KV heads.
        head_dim: channels of a head.
        page: tokens of a block.
        dtype: that they are stored in.
    """

    def __init__(self, kind: Kind, kv_heads: int, head_dim: int, page: int, dtype: torch.dtype) -> None:
        self.kind, self.kv_heads, self.head_dim, self.page, self.dtype = kind, kv_heads, head_dim, page, dtype

    @property
    def nbytes(self) -> int:
        return self.kv_heads * self.head_dim * self.page * self.dtype.itemsize

    def write(self, blocks: Tensor, states: Tensor, slots: Tensor, positions: Tensor) -> None:
        states = states.to(self.dtype).nan_to_num()  # must not reach other tokens, not even with weight 0
        self.states(blocks)[slots // self.page, :, slots % self.page] = states

    def read(self, blocks: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        return self.states(blocks)[table.long()].transpose(0, 1).flatten(1, 2).to(dtype)

    def round_trip(self, states: Tensor, positions: Tensor) -> Tensor:
        return states.to(self.dtype).to(states.dtype)

    def native(self, blocks: Tensor, table: Tensor) -> CSegments:
        states = self.states(blocks)
        run = CRun(
            data=states.data_ptr(),
            data_strides=(0, states.stride(1), states.stride(0)),
            bits=FULL_PRECISION_BITS,
            channels=self.head_dim,
            dtype=DTYPES[self.dtype],
        )
        return CSegments(runs=ctypes.pointer(run), run_count=1, page=self.page, dim=self.head_dim)

    def states(self, blocks: Tensor) -> Tensor:
        """Return the states of blocks, `[N, H_kv, page, D]`."""
        axes = (self.page, self.head_dim) if self.kind == "value" else (self.head_dim, self.page)
        states: Tensor = blocks.view(self.dtype).unflatten(1, (self.kv_heads, *axes))
        return states if self.kind == "value" else states.transpose(2, 3)
