"""Tokens that importance has sorted into tiers, each stored its own way, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .pages import Channels, Packed

EVICTED: Final = 255
"""The tier of tokens that are gone: they count as places, and nothing attends to them."""


@dataclass(frozen=True)
class Tiers:
    """The tokens between sinks and tail. Every KV head has as many tokens in a tier as every other.

    Attributes:
        tier: `[B, H_kv, T]` uint8, in which tier each token is, or `EVICTED`.
        held: what holds each tier's tokens, in the order of their places; a tensor `[B, H_kv, n, D]` in full precision.
    """

    tier: Tensor
    held: tuple[Packed | Channels | Tensor, ...]

    @property
    def tokens(self) -> int:
        """Tokens, those that are gone included."""
        return self.tier.shape[2]

    @property
    def kept(self) -> int:
        """Tokens of every KV head that can be attended to."""
        return sum(count(held) for held in self.held)

    @property
    def quantized(self) -> int:
        """Tokens of every KV head that are quantized."""
        return sum(held.tokens for held in self.held if not isinstance(held, Tensor))

    def places(self, tier: int) -> Tensor:
        """Where the tokens of a tier (or those evicted) stand, `[B, H_kv, n]`, counted from the first of all tiers."""
        elsewhere = (self.tier != tier).byte()  # sorted, not picked: a GPU then need not say how many there are
        there = self.tokens - self.kept if tier == EVICTED else count(self.held[tier])
        return elsewhere.argsort(stable=True)[..., :there]

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Tokens `[start, stop)`, dequantized: `[B, H_kv, stop - start, D]`. Touches all of them.

        Raises:
            ValueError: if some of all tokens are gone.
        """
        if self.kept < self.tokens:
            raise ValueError(f"{self.tokens - self.kept} of {self.tokens} tokens have been evicted")
        states = [x.to(dtype) if isinstance(x, Tensor) else x.read(0, x.tokens, dtype) for x in self.held]
        sorted_states = torch.cat(states, dim=2)
        places = torch.cat([self.places(tier) for tier in range(len(self.held))], dim=2)
        whole = torch.empty_like(sorted_states)
        return whole.scatter_(2, places[..., None].expand_as(whole), sorted_states)[:, :, start:stop]


def count(held: Packed | Channels | Tensor) -> int:
    """Tokens that a tier holds."""
    return held.shape[2] if isinstance(held, Tensor) else held.tokens
