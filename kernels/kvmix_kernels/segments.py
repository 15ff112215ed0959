"""The only type that attention takes of one layer's keys or values: sink | packed tokens | tail.

Packed tokens are whole pages in the order of their tokens (`pages.py`), or tokens that were sorted by importance
(`sorted_tokens.py`). All are views of memory that the cache owns, and none ever copies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .pages import Channels, Packed, Plain, TokenPages
from .sorted_tokens import SortedTokens


@dataclass(frozen=True)
class Segments:
    """Keys or values in the order of their tokens.

    Attributes:
        sink: `[B, H_kv, sinks, D]`, or None.
        packed: the tokens after the sinks, or None.
        tail: `[B, H_kv, tokens, D]`, the most recent tokens.
    """

    sink: Tensor | None
    packed: TokenPages | SortedTokens | None
    tail: Tensor

    @cached_property
    def shape(self) -> torch.Size:
        """`[B, H_kv, T, D]`, as if it were one tensor."""
        batch, heads, tail, width = self.tail.shape
        return torch.Size((batch, heads, self.sinks + self.packed_tokens + tail, width))

    @property
    def sinks(self) -> int:
        """Number of sink tokens."""
        return 0 if self.sink is None else self.sink.shape[2]

    @property
    def packed_tokens(self) -> int:
        """Number of tokens between sinks and tail."""
        return 0 if self.packed is None else self.packed.tokens

    @property
    def edges(self) -> tuple[int, int]:
        """First and last-plus-one packed token."""
        return self.sinks, self.sinks + self.packed_tokens

    @property
    def kept_tokens(self) -> int:
        """Tokens that can be attended to: all but those that a token policy has evicted."""
        return self.shape[2] - (0 if self.packed is None else self.packed.tokens - self.packed.kept)

    @property
    def quantized_tokens(self) -> int:
        """Tokens that are read in quantized form."""
        return 0 if self.packed is None else self.packed.quantized

    @property
    def runs(self) -> tuple[Packed | Plain, ...]:
        """Runs of channels in which the pages are stored, none where there is no page.

        Raises:
            AssertionError: for sorted tokens, transform codes and chosen pages, which have none.
        """
        if self.packed is not None and not isinstance(self.packed, (Packed, Channels)):
            raise AssertionError(f"{type(self.packed).__name__} have no runs of channels that all tokens share")
        return () if self.packed is None or self.packed.pages == 0 else self.packed.runs

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `[start, stop)` in `dtype`, dequantized where they are packed: `[B, H_kv, stop - start, D]`."""
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
        """Return one plain tensor `[B, H_kv, T, D]` in the tail's dtype, which costs the memory that the cache saves.

        Raises:
            ValueError: if any token has been evicted.
        """
        return self.read(0, self.shape[2], self.tail.dtype)
