"""Tokens that are sorted, of which every KV head keeps a number of its own, in whole pages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kvmix_kernels.pooled import PooledTokens
from kvmix_kernels.sorted_tokens import EVICTED
from torch import Tensor

from ..archive import Archive
from ..buffer import Buffer
from .base import Packing
from .sorted import SortedPacking


class PooledPacking(SortedPacking):
    """Pages of all KV heads in one row `[B, 1, n, D]`; the tokens in none of them are dropped (AdaKV).

    Args:
        name: of the tensor, for errors, e.g. `layer 3 keys`.
        form: storage of the tokens.
        flush: tokens that are sorted together.
        page: tokens of a page.
        tiers_of: the tiers `[B, H_kv, n]` uint8 of the tokens `[B, H_kv, n, D]` that are packed next: 0 for those that
            stay, whole pages of each head, as many in every sequence.
        tier_of_token, head_of_page: tiers of all tokens so far, and the KV head of each page that is held; shared by
            keys and values, so no part of `buffers`.
    """

    def __init__(
        self,
        name: str,
        form: Packing,
        flush: int,
        page: int,
        tiers_of: Callable[[Tensor], Tensor],
        tier_of_token: Buffer,
        head_of_page: Buffer,
    ) -> None:
        super().__init__(name, [form], flush)
        self._page = page
        self._tiers_of = tiers_of
        self._tier_of_token = tier_of_token
        self._head_of_page = head_of_page
        self._view: PooledTokens | None = None

    @property
    def view(self) -> PooledTokens:
        """Return what is held, without a copy: one object until that changes."""
        tier, heads, view = self._tier_of_token.view, self._head_of_page.view, self._view
        held, pages = self._held, self._forms[0].tokens // self._page
        if view is None or view.held[0] is not held[0] or view.tokens != self._tokens or view.heads.shape[2] != pages:
            view = self._view = PooledTokens(tier[:, :, : self._tokens], held, heads[:, :, :pages], self._page)
        return view

    def exchange(self, archive: Archive) -> None:
        super().exchange(archive.part("pooled", archive.example[:, :1]))

    def _pack(self, states: Tensor) -> None:
        stay = self._tiers_of(states) != EVICTED
        self._forms[0].pack(states[stay].view(states.shape[0], 1, -1, states.shape[3]))


def heads_of_pages(tiers: Tensor, page: int) -> Tensor:
    """Return the KV head of each page of the tokens that stay, `[B, 1, N]` int16, of tiers `[B, H_kv, n]`."""
    pages = (tiers != EVICTED).sum(-1) // page
    heads = torch.arange(tiers.shape[1], dtype=torch.int16, device=tiers.device).repeat(tiers.shape[0])
    return heads.repeat_interleave(pages.flatten()).view(tiers.shape[0], 1, -1)
