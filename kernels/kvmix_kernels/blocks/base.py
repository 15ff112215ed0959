"""Storage of one layer's keys, or values, in the blocks of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..layout import Kind
from ..runtime.native.structs import CSegments

GPU_BLOCKS = (64, 128, 256)
"""Tokens of the blocks that GPU kernels read: of 64, values fill a tensor core (`attend/triton/steps.py`)."""
GPU_FRAME = 128
"""Tokens of which a frame of transform codes must have whole numbers, or whole blocks if these are longer."""


class BlockTensor(ABC):
    """Keys or values of one layer, as a block has them in `nbytes` of its bytes.

    `blocks` is everywhere a view `[N, nbytes]` uint8 of the bytes that are theirs, whose rows may lie apart.

    Attributes:
        kind: `"key"` or `"value"`.
        kv_heads: number of KV heads, `H_kv`.
        head_dim: channels of a head, `D`.
        page: tokens of a block.
        nbytes: bytes of a block.
    """

    kind: Kind
    kv_heads: int
    head_dim: int
    page: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes of a block."""

    @abstractmethod
    def write(self, blocks: Tensor, states: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store tokens; what else is in their blocks stays as it is.

        Args:
            blocks: `[N, nbytes]` uint8.
            states: `[n, H_kv, D]`, any floating dtype.
            slots: `[n]` int64, `block * page + token of the block`, none of them twice.
            positions: `[n]` int64, of the tokens in their sequences.
        """

    @abstractmethod
    def read(self, blocks: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what a sequence's blocks hold, `[H_kv, pages * page, D]` in `dtype`.

        Args:
            blocks: `[N, nbytes]` uint8.
            table: `[pages]`, the blocks of the sequence in the order of its tokens.
            dtype: of the result.
        """

    @abstractmethod
    def round_trip(self, states: Tensor, positions: Tensor) -> Tensor:
        """Return tokens `[n, H_kv, D]` as they are read after they were written, in their dtype."""

    @abstractmethod
    def native(self, blocks: Tensor, table: Tensor) -> CSegments:
        """Return the argument of native attention over these sequences, whose table the caller sets.

        It points into `blocks` and into this tensor, and may be returned again for the same blocks.

        Args:
            blocks: `[N, nbytes]` uint8.
            table: `[B, pages]` int32, the blocks of each sequence.
        """
