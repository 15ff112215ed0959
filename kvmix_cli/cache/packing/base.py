"""The storage of tokens that leave a store's window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from kvmix_kernels.pages import TokenPages
from kvmix_kernels.sorted_tokens import SortedTokens
from torch import Tensor

from ..archive import Archive
from ..buffer import Buffer


class Packing(ABC):
    """Storage of the tokens between sink and tail, `[B, H_kv, T, D]`.

    Attributes:
        unit: tokens that are packed together; they come in multiples of it.
    """

    unit: int

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Return the number of tokens held."""

    @property
    @abstractmethod
    def view(self) -> TokenPages | SortedTokens | Tensor:
        """Return what is held, without a copy; there must be something."""

    @abstractmethod
    def pack(self, states: Tensor) -> None:
        """Append tokens `[B, H_kv, n, D]`. Raises QuantizationError for numbers that cannot be quantized."""

    @abstractmethod
    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        """Forget all but the first `keep` tokens rounded down to whole units, and return the rest of `keep` in `dtype`.

        Raises:
            PlanError: if some of that rest has been evicted; nothing is forgotten then.
        """

    def cut(self, tokens: int) -> int:
        """Return the most tokens, at most so many, that `reopen` can keep without decoding the others: whole units."""
        return tokens // self.unit * self.unit

    def select(self, places: Tensor) -> None:
        """Keep the units at `places` `[B, H_kv, n]` only, in this order; a unit is `unit` tokens."""
        raise AssertionError(f"{type(self).__name__} never drops some of its tokens")

    @abstractmethod
    def exchange(self, archive: Archive) -> None:
        """Give everything held to an archive, or take it from one, empty as this packing is then."""

    @abstractmethod
    def buffers(self) -> Iterator[Buffer]:
        """Yield everything that is stored."""
