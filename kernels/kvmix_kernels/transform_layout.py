"""Layout of a page of transform codes, and its size in bytes. No torch: budgets use the same formula.

A transform turns the tokens of a KV head into directions, the most important first, and stores each at a width of its
own: 0 to 6 bits, the same for a run of 8 directions. Widths never rise along a head, and heads have their own. Codes
lie direction by direction, so that neighbours in memory are tokens of one direction, for keys and values alike:

    codes   uint8  [page_bytes]     heads one after the other; in a head its directions; in a direction its bit planes
    plane   of b bits, page * b / 8 bytes: field j of byte i (bits j * b to j * b + b - 1) is token j * page * b / 8 + i

A direction of 0 bits takes no bytes. 3, 5 and 6 bits are a plane of the low bits, then a plane of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import Final

from .layout import FULL_PRECISION_BITS, Kind

RUN: Final = 8
"""Directions that have one width."""
MAX_WIDTH: Final = 6
"""Wider codes clip heavy tails, and the metric promises more than they give (docs/transform-coding.md)."""
STEPS: Final = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041}
"""Step of the best uniform quantizer of a unit Gaussian at each width (Max 1960, table II)."""
LEFT: Final = {0: 1.0, 1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349, 6: 0.00104}
"""Variance of a unit Gaussian that such a quantizer leaves."""
PLANES: Final = {0: (), 1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}
"""Widths of the bit planes of a code, lowest bits first."""
TOKEN_SCALE_BYTES: Final = 2
CHOICE_BYTES: Final = 12
"""An exact token has its place, int32, and what it was chosen by, error and attention, float32; keys and values share
them."""
LEAST_PAGES: Final = 8
"""There are as many exact tokens as of so many pages from the first page on, so that the tokens that matter most, which
are among the first, need not wait for pages to account for them."""
MAX_PAGE: Final = 2**15


def exact_count(exact: int, pages: int, page: int) -> int:
    """Return the exact tokens of a KV head with `pages` pages of `page` tokens, `exact` for each in the long run."""
    return min(exact * max(pages, LEAST_PAGES), pages * page)


@dataclass(frozen=True)
class TransformLayout:
    """The shape of a page of transform codes, of all KV heads of one layer.

    Args:
        kind: `"key"`, or `"value"`, whose tokens have a scale of 16 bits each.
        widths: of every KV head, the width of each run of 8 directions; the last run may be shorter.
        head_dim: directions of a head, `D`.
        page: tokens in a page, a multiple of 16.
        exact: tokens of each KV head that keep their keys and values unquantized, for each page; see `exact_count`.

    Raises:
        ValueError: for a value outside of the above, or for widths that rise.
    """

    kind: Kind
    widths: tuple[tuple[int, ...], ...]
    head_dim: int
    page: int
    exact: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("key", "value"):
            raise ValueError(f"kind must be 'key' or 'value', got {self.kind!r}")
        if self.head_dim < 1 or not self.widths:
            raise ValueError(f"expected at least one KV head and direction, got {len(self.widths)} x {self.head_dim}")
        if not 16 <= self.page <= MAX_PAGE or self.page % 16:
            raise ValueError(f"page must be a multiple of 16 up to {MAX_PAGE}, got {self.page}")
        if not 0 <= self.exact < self.page:
            raise ValueError(f"exact must be from 0 to {self.page - 1} tokens a page, got {self.exact}")
        for head, widths in enumerate(self.widths):
            if len(widths) != self.runs:
                raise ValueError(
                    f"head {head} has {len(widths)} widths; its {self.head_dim} directions take {self.runs}"
                )
            if unknown := [width for width in widths if width not in PLANES]:
                raise ValueError(f"head {head} has a width of {unknown[0]}; expected 0 to {MAX_WIDTH}")
            if list(widths) != sorted(widths, reverse=True):
                raise ValueError(f"head {head} has widths that rise, {list(widths)}; expected the widest first")

    @property
    def kv_heads(self) -> int:
        """Return the number of KV heads, `H_kv`."""
        return len(self.widths)

    @property
    def runs(self) -> int:
        """Return the runs of directions in a head."""
        return -(-self.head_dim // RUN)

    @property
    def is_scaled(self) -> bool:
        """Return whether tokens have a scale each."""
        return self.kind == "value"

    @cached_property
    def direction_widths(self) -> tuple[tuple[int, ...], ...]:
        """Return the width of every direction, `[H_kv][D]`."""
        return tuple(tuple(widths[d // RUN] for d in range(self.head_dim)) for widths in self.widths)

    @cached_property
    def coded(self) -> tuple[int, ...]:
        """Return the directions of more than 0 bits, for each KV head."""
        return tuple(sum(width > 0 for width in widths) for widths in self.direction_widths)

    @cached_property
    def head_bytes(self) -> tuple[int, ...]:
        """Return the bytes of a page's codes, for each KV head."""
        sizes = [min(RUN, self.head_dim - first) for first in range(0, self.head_dim, RUN)]
        return tuple(sum(map(mul, sizes, widths)) * self.page // 8 for widths in self.widths)

    @cached_property
    def head_offsets(self) -> tuple[int, ...]:
        """Return the first byte of each KV head in a page."""
        return tuple(accumulate((0, *self.head_bytes[:-1])))

    @property
    def page_bytes(self) -> int:
        """Return the bytes of a page's codes, of all KV heads."""
        return sum(self.head_bytes)

    @property
    def nominal_bits(self) -> float:
        """Return the bits of the codes alone, per element."""
        return 8 * self.page_bytes / (self.page * self.head_dim * self.kv_heads)

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of codes and token scales of a page of all KV heads."""
        return self.page_bytes + self.kv_heads * (self.page * TOKEN_SCALE_BYTES if self.is_scaled else 0)

    @property
    def token_bits(self) -> int:
        """Return the bits of a token's codes, of all KV heads."""
        return 8 * self.page_bytes // self.page

    @property
    def stored_bytes(self) -> int:
        """Return the bytes of a page of all KV heads in the long run: codes, token scales, exact tokens in 16 bits.

        What exact tokens were chosen by counts with the keys.
        """
        token = self.head_dim * FULL_PRECISION_BITS // 8 + (0 if self.is_scaled else CHOICE_BYTES)
        return self.packed_bytes + self.kv_heads * self.exact * token

    @property
    def stored_bits(self) -> float:
        """Return the stored bits per element."""
        return 8 * self.stored_bytes / (self.page * self.head_dim * self.kv_heads)
