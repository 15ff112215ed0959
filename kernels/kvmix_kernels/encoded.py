"""Type of pages that a codec without a kernel has stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .pages import TokenPages


@dataclass(frozen=True, eq=False)
class CodecPages(TokenPages):
    """Pages that only their codec reads: attention over them is that of `attend/naive.py`, on every device.

    Attributes:
        parts: `[B, H_kv, pages, ...]` each, by name.
        decode: function from parts of some of the pages to their tokens `[B, H_kv, n, page, channels]`.
        size: tokens of a page.
        channels: of a token.
        turn: function from decoded pages and the number of the first of them to what attention reads, where that
            depends on positions; None for the same.
    """

    parts: Mapping[str, Tensor]
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    size: int
    channels: int
    turn: Callable[[Tensor, int], Tensor] | None = None

    @property
    def page(self) -> int:
        return self.size

    @property
    def pages(self) -> int:
        return next(iter(self.parts.values())).shape[2]

    @property
    def width(self) -> int:
        return self.channels

    def select(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        pages = self.decode({name: part[:, :, first:last] for name, part in self.parts.items()}).to(dtype)
        return pages if self.turn is None else self.turn(pages, first)
