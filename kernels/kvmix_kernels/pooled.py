"""Type of sorted tokens of which every KV head keeps a number of its own: the pages of all heads are in one row.

A row of pages is as long in every sequence, whichever heads its pages are of. Attention reads the pages of each head by
a list of their places in the row; where a head has fewer pages than another one, the rest of its list is masked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .pages import Channels, Packed
from .sorted_tokens import EVICTED, SortedTokens
from .summaries import ChosenPages


@dataclass(frozen=True, eq=False)
class PooledTokens(SortedTokens):
    """Tokens that were sorted, the pages of all KV heads in one row; the others are dropped.

    Attributes:
        tier: `[B, H_kv, T]` uint8, 0 for each token that is held, `EVICTED` for the others.
        held: one form of one row, `[B, 1, ...]`: packed pages, or a tensor `[B, 1, N * page, D]` in full precision.
        heads: `[B, 1, N]` int16, the KV head of each page. Pages of a head are in the order of their tokens.
        page: tokens of a page.
    """

    tier: Tensor
    held: tuple[Packed | Channels | Tensor, ...]
    heads: Tensor
    page: int

    @property
    def tokens(self) -> int:
        return self.tier.shape[2]

    @property
    def kept(self) -> int:
        """Tokens that can be attended to, in the mean over KV heads."""
        return self.heads.shape[2] * self.page // self.tier.shape[1]

    @property
    def quantized(self) -> int:
        """Tokens that are read in quantized form, in the mean over KV heads."""
        return 0 if isinstance(self.held[0], Tensor) else self.kept

    @property
    def of_heads(self) -> ChosenPages | Tensor:
        """The pages of each KV head, `[B, H_kv, n]` of them, as many as the head with the most has; or a copy."""
        form, numbers = self.held[0], self._list[0]
        if not isinstance(form, Tensor):
            return ChosenPages(self._every, numbers)
        pages, batch = form[:, 0].unflatten(1, (-1, self.page)), torch.arange(form.shape[0], device=form.device)
        copy: Tensor = pages[batch[:, None, None], numbers.long()].flatten(2, 3)
        return copy

    @property
    def are_tokens(self) -> Tensor:
        """Marks of the tokens in `of_heads` that are the head's own, `[B, H_kv, n * page]` bool."""
        return self._list[1].repeat_interleave(self.page, dim=2)

    def places(self, form: int) -> Tensor:
        """Return the positions of the tokens in `of_heads`, any for those that are not the head's own."""
        there = self._list[0].shape[2] * self.page
        return (self.tier == EVICTED).byte().argsort(stable=True)[..., :there]

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return tokens `[start, stop)`, dequantized. Raises ValueError if any token has been evicted."""
        if self.kept < self.tokens:
            return super().read(start, stop, dtype)
        states = self.of_heads
        return states[:, :, start:stop].to(dtype) if isinstance(states, Tensor) else states.read(start, stop, dtype)

    @cached_property
    def _list(self) -> tuple[Tensor, Tensor]:
        """The places in the row of each KV head's pages, `[B, H_kv, n]` int32, and which of these are its own."""
        heads, count = self.heads[:, 0].long(), self.heads.shape[2]
        of_head = heads[:, None] == torch.arange(self.tier.shape[1], device=heads.device)[:, None]
        counts = of_head.sum(2, keepdim=True)
        ranks = torch.arange(int(counts.max()), device=heads.device)
        places = (counts.cumsum(1) - counts + ranks).clamp(max=count - 1)
        in_order = heads.argsort(dim=1, stable=True)[:, None].expand(-1, places.shape[1], -1)
        return in_order.gather(2, places).int().contiguous(), ranks < counts

    @cached_property
    def _every(self) -> Packed:
        """The row as every KV head's own, which takes no memory."""
        form, kv_heads = self.held[0], self.tier.shape[1]
        if not isinstance(form, Packed):
            raise AssertionError("pages of one row have one layout")
        words, scales = (each.expand(-1, kv_heads, *each.shape[2:]) for each in (form.words, form.scales))
        return replace(form, words=words, scales=scales)
