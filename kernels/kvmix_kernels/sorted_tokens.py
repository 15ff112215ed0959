"""Types of tokens that were sorted by importance as they were packed: held in some forms, or dropped.

Tiers           tiers of one width each, or evicted
KeptTokens      a bounded number of tokens, in any order, all others evicted
PooledTokens    another number of tokens in each KV head (`pooled.py`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .pages import Channels, Packed, TokenPages

EVICTED: Final = 255
"""The tier of evicted tokens: they keep their position, and nothing attends to them."""


class SortedTokens(ABC):
    """Tokens that were sorted by importance: held in one form or several, or dropped.

    Every KV head holds as many tokens in each form as every other, but tokens of its own.

    Attributes:
        held: the tokens of each form; a tensor `[B, H_kv, n, D]` is full precision.
    """

    held: tuple[Packed | Channels | Tensor, ...]

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Number of tokens, those that were dropped included."""

    @abstractmethod
    def places(self, form: int) -> Tensor:
        """Return the positions of a form's tokens, in its order, `[B, H_kv, n]`, counted after the sinks."""

    @property
    def kept(self) -> int:
        """Tokens of every KV head that can be attended to."""
        return sum(count(held) for held in self.held)

    @property
    def quantized(self) -> int:
        """Tokens of every KV head that are read in quantized form."""
        return sum(held.tokens for held in self.held if not isinstance(held, Tensor))

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `[start, stop)`, dequantized: `[B, H_kv, stop - start, D]`. Reads all tokens.

        Raises:
            ValueError: if any token has been evicted.
        """
        if (evicted := self.tokens - self.kept) > 0:
            words = f"{evicted} of {self.tokens} tokens have been evicted"
            raise ValueError(f"{words}; only a cache that keeps all of its tokens can be read as one tensor")
        states = [x.to(dtype) if isinstance(x, Tensor) else x.read(0, x.tokens, dtype) for x in self.held]
        sorted_states = torch.cat(states, dim=2)
        places = torch.cat([self.places(form) for form in range(len(self.held))], dim=2).long()
        whole = torch.empty_like(sorted_states)
        return whole.scatter_(2, places[..., None].expand_as(whole), sorted_states)[:, :, start:stop]


@dataclass(frozen=True)
class Tiers(SortedTokens):
    """Tokens in tiers.

    Attributes:
        tier: `[B, H_kv, T]` uint8, the tier of each token, or `EVICTED`.
        held: the tokens of each tier in the order of their positions.
        log_weight: of the last tier, the logarithm of the number of tokens that each token counts for.
    """

    tier: Tensor
    held: tuple[Packed | Channels | Tensor, ...]
    log_weight: float = 0.0

    @property
    def tokens(self) -> int:
        return self.tier.shape[2]

    def places(self, form: int) -> Tensor:
        """Return the positions of a tier's tokens (or of those evicted), `[B, H_kv, n]`, counted after the sinks."""
        elsewhere = (self.tier != form).byte()  # sorted, not selected: a GPU then need not say how many there are
        there = self.tokens - self.kept if form == EVICTED else count(self.held[form])
        return elsewhere.argsort(stable=True)[..., :there]


@dataclass(frozen=True)
class KeptTokens(SortedTokens):
    """A bounded number of tokens of all that there were, in one form, in any order.

    Attributes:
        positions: `[B, H_kv, n]` int32, of each token that is held, counted after the sinks.
        held: the tokens, one form.
        total: number of tokens that there were.
    """

    positions: Tensor
    held: tuple[Packed | Channels | Tensor, ...]
    total: int

    @property
    def tokens(self) -> int:
        return self.total

    def places(self, form: int) -> Tensor:
        return self.positions.long()


def count(held: TokenPages | Tensor) -> int:
    """Return the number of tokens in a tier."""
    return held.shape[2] if isinstance(held, Tensor) else held.tokens
