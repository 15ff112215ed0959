"""One layer's keys or values as attention reads them: sink | packed pages | tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .pages import Channels, Packed
from .tiers import Tiers


@dataclass(frozen=True)
class Segments:
    """Keys or values in the order of their tokens; views, never copies.

    Attributes:
        sink: `[B, H_kv, sinks, D]`, or None.
        packed: the quantized tokens after the sinks, or None.
        tail: `[B, H_kv, tokens, D]`, the most recent tokens.
    """

    sink: Tensor | None
    packed: Packed | Channels | Tiers | None
    tail: Tensor

    @property
    def shape(self) -> torch.Size:
        """`[B, H_kv, T, D]`, as if it were one tensor."""
        batch, heads, tail, width = self.tail.shape
        return torch.Size((batch, heads, self.sinks + self.packed_tokens + tail, width))

    @property
    def sinks(self) -> int:
        return 0 if self.sink is None else self.sink.shape[2]

    @property
    def packed_tokens(self) -> int:
        """Tokens between sinks and tail."""
        return 0 if self.packed is None else self.packed.tokens

    @property
    def edges(self) -> tuple[int, int]:
        """First and last-plus-one packed token."""
        return self.sinks, self.sinks + self.packed_tokens

    @property
    def kept_tokens(self) -> int:
        """Tokens that can be attended to: all but those that a policy has evicted."""
        return self.shape[2] - (self.packed.tokens - self.packed.kept if isinstance(self.packed, Tiers) else 0)

    @property
    def quantized_tokens(self) -> int:
        """Tokens that are read in quantized form."""
        return self.packed.quantized if isinstance(self.packed, Tiers) else self.packed_tokens

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Tokens `[start, stop)` in `dtype`, dequantized where they are packed: `[B, H_kv, stop - start, D]`."""
        first, last = self.edges
        parts = []
        if self.sink is not None and start < first:
            parts.append(self.sink[:, :, start:stop].to(dtype))
        if self.packed is not None and start < last and stop > first:
            parts.append(self.packed.read(max(start, first) - first, min(stop, last) - first, dtype))
        if stop > last or not parts:
            parts.append(self.tail[:, :, max(0, start - last) : stop - last].to(dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def dequantize(self) -> Tensor:
        """All of it as one plain tensor `[B, H_kv, T, D]` in the tail's dtype; costs what the cache is made to save.

        Raises:
            ValueError: if some tokens have been evicted.
        """
        return self.read(0, self.shape[2], self.tail.dtype)
