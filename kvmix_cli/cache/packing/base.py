"""What a store does with the tokens that leave its window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from kvmix_kernels.segments import Channels, Packed, Tiers
from torch import Tensor

from ..buffer import Buffer


class Packing(ABC):
    """Holds the tokens between sinks and tail, `[B, H_kv, T, D]`.

    Attributes:
        unit: tokens that are packed together; they come in multiples of it.
    """

    unit: int

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens held."""

    @property
    @abstractmethod
    def view(self) -> Packed | Channels | Tiers | Tensor:
        """What is held, without a copy; there must be something."""

    @abstractmethod
    def pack(self, states: Tensor) -> None:
        """Append tokens `[B, H_kv, n, D]`. Raises QuantizationError for what cannot be quantized."""

    @abstractmethod
    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        """Forget all but the first `keep` tokens, as far as whole units go; returns the rest of them in `dtype`.

        Raises:
            PlanError: if some of that rest is gone for good.
        """

    @abstractmethod
    def buffers(self) -> Iterator[Buffer]:
        """Everything that is stored."""
