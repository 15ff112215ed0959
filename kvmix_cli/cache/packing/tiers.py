"""Tiers of tokens, chosen by importance, once, as the tokens leave the window (MiKV, ZipCache, H2O)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from kvmix_kernels.segments import Channels, Packed, Tiers
from torch import Tensor

from ...errors import PlanError
from ..archive import Archive
from ..buffer import Buffer
from .base import Packing


class FullPacking(Packing):
    """A tier in full precision, of any number of tokens.

    Args:
        reserve: tokens to make room for at first.
    """

    unit = 1

    def __init__(self, reserve: int = 0) -> None:
        self._states = Buffer(reserve)

    @property
    def tokens(self) -> int:
        return self._states.length

    @property
    def view(self) -> Tensor:
        return self._states.view

    def pack(self, states: Tensor) -> None:
        self._states.append(states)

    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        self._states.truncate(keep)
        return self._states.view[:, :, :0]

    def exchange(self, archive: Archive) -> None:
        archive.buffer("states", self._states, (*archive.rows, None, archive.example.shape[3]))

    def buffers(self) -> Iterator[Buffer]:
        yield self._states


class TierPacking(Packing):
    """Tokens in tiers of their own storage; evicted tokens are in none.

    Args:
        name: of the tensor, for errors, e.g. `layer 3 keys`.
        tiers: storage of each tier.
        flush: tokens that are packed together; each tier then gets whole units of its own.
        tiers_of: the tiers `[B, H_kv, n]` uint8 of the tokens `[B, H_kv, n, D]` that are packed next.
        tier_of_token: the tiers of all tokens so far; shared by keys and values, so no part of `buffers`.
    """

    def __init__(
        self,
        name: str,
        tiers: Sequence[Packing],
        flush: int,
        tiers_of: Callable[[Tensor], Tensor],
        tier_of_token: Buffer,
    ) -> None:
        self.unit = flush
        self._name = name
        self._tiers = tiers
        self._tiers_of = tiers_of
        self._tier_of_token = tier_of_token
        self._tokens = 0

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def view(self) -> Tiers:
        held: list[Packed | Channels | Tensor] = [tier.view for tier in self._tiers]  # type: ignore[misc]
        return Tiers(self._tier_of_token.view[:, :, : self._tokens], tuple(held))

    def pack(self, states: Tensor) -> None:
        tiers = self._tiers_of(states)
        for index, tier in enumerate(self._tiers):
            tier.pack(states[tiers == index].view(*states.shape[:2], -1, states.shape[3]))
        self._tokens += states.shape[2]

    def reopen(self, keep: int, dtype: torch.dtype) -> Tensor:
        """Forget every token and return the first `keep`: the kept ones are in every tier, so all have to be read.

        Raises:
            PlanError: if some tokens have been evicted.
        """
        view = self.view
        if view.kept < view.tokens:
            raise PlanError(
                f"{self._name}: the cache cannot go back to {keep} packed tokens, since a token policy has evicted "
                f"{view.tokens - view.kept} of {view.tokens}; use a policy without `evict`"
            )
        rest = view.read(0, keep, dtype)
        for tier in self._tiers:
            tier.reopen(0, dtype)
        self._tokens = 0
        return rest

    def cut(self, tokens: int) -> int:
        """Return 0: kept tokens are in every tier, so others cannot be forgotten without decoding all."""
        return 0

    def exchange(self, archive: Archive) -> None:
        """Give everything held to an archive, or take it, but for the tiers of tokens, which belong to the layer."""
        self._tokens = archive.number("tokens", self._tokens)
        for number, tier in enumerate(self._tiers):
            tier.exchange(archive.part(f"{number}"))

    def buffers(self) -> Iterator[Buffer]:
        for tier in self._tiers:
            yield from tier.buffers()
