"""Type of pages of vector codes: each code stands for a few neighbouring channels of a token, by a codebook."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .encoded import CodecPages


@dataclass(frozen=True, eq=False, kw_only=True)
class VectorPages(CodecPages):
    """Pages of vector codes, whose codebooks the native library reads; elsewhere their codec decodes them.

    Parts are `codes` `[B, H_kv, pages, page * D / span * width / 8]` uint8, those of a token in a row, those of 6 bits
    in a plane of 4 bits and one of 2; and, if tokens have scales, `scales` `[B, H_kv, pages, page]`.

    Attributes:
        books: `[1 or H_kv, 1 or D / span, span, 2^width]` float32, contiguous: the entries of each codebook by channel.
    """

    books: Tensor

    @property
    def codes(self) -> Tensor:
        """The packed codes."""
        return self.parts["codes"]

    @property
    def scales(self) -> Tensor | None:
        """The scales of tokens, if they have any."""
        return self.parts.get("scales")

    @property
    def span(self) -> int:
        """Channels that a code stands for."""
        return self.books.shape[2]

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return self.books.shape[3].bit_length() - 1
