"""Layout of a page of keys or values, and its size in bytes. No torch: budgets use the same formula.

A page holds `page` consecutive tokens of one KV head. Keys and values are stored as the same thing, a matrix
`[rows, columns]` whose rows are the axis that attention contracts:

    keys    [head_dim, page]    q·k sums over channels       groups run along tokens    (per channel)
    values  [page, head_dim]    p·v sums over tokens         groups run along channels  (per token)

Codes are packed along the rows, strided, in 16-bit words: with `E = 16 / bits` fields in a word, field `j` of word
row `c` is row `j * rows / E + c`. Every field is then a contiguous slice of the contraction axis, so a kernel
unpacks by masking and never gathers. 3-bit codes are a 2-bit plane followed by a 1-bit plane: exactly 3 bits.

    words   int16          [rows * bits / 16, columns]
    scales  scale_dtype    [2, groups, rows]            scale and zero (the group's minimum)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["key", "value"]
KINDS: Final[tuple[Kind, Kind]] = ("key", "value")
Encoder = Literal["minmax", "refit", "search"]
"""How the scale and zero of a group are chosen (`quantize/grids.py`). Layout, bytes and decoding are the same."""
ENCODERS: Final[tuple[Encoder, ...]] = ("minmax", "refit", "search")

BITS: Final = (1, 2, 3, 4, 8)
"""Bit widths that are stored as codes; 16 means full precision."""
FULL_PRECISION_BITS: Final = 16
WORD_BITS: Final = 16
SCALE_BYTES: Final = {"float16": 2, "bfloat16": 2}
_PLANES: Final = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclass(frozen=True)
class PageLayout:
    """The shape of a packed page.

    Args:
        kind: `"key"` (groups run along tokens) or `"value"` (groups run along channels).
        bits: 1, 2, 3, 4 or 8.
        head_dim: channels of a KV head, a multiple of 16.
        page: tokens in a page, a multiple of 16.
        group_size: elements that share a scale and a zero; `None` is the whole row. A row that the group does
            not divide ends in a shorter group.
        scale_dtype: `"float16"` or `"bfloat16"`.

    Raises:
        ValueError: for a value outside of the above.
    """

    kind: Kind
    bits: int
    head_dim: int
    page: int
    group_size: int | None = None
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.kind not in ("key", "value"):
            raise ValueError(f"kind must be 'key' or 'value', got {self.kind!r}")
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")
        for name in ("head_dim", "page"):
            size = getattr(self, name)
            if size < WORD_BITS or size % WORD_BITS:
                raise ValueError(f"{name} must be a positive multiple of {WORD_BITS}, got {size}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive, got {self.group_size}")
        if self.scale_dtype not in SCALE_BYTES:
            raise ValueError(f"scale_dtype must be one of {sorted(SCALE_BYTES)}, got {self.scale_dtype!r}")

    @property
    def rows(self) -> int:
        """Length of the contracted axis: channels of keys, tokens of values."""
        return self.head_dim if self.kind == "key" else self.page

    @property
    def columns(self) -> int:
        """Length of the other axis, the one that groups run along."""
        return self.page if self.kind == "key" else self.head_dim

    @property
    def group(self) -> int:
        """Elements in a full group."""
        return self.columns if self.group_size is None else min(self.group_size, self.columns)

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return -(-self.columns // self.group)

    @property
    def levels(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths of the bit planes, lowest bits first."""
        return _PLANES[self.bits]

    @property
    def words_shape(self) -> tuple[int, int]:
        """Shape of a page's int16 words."""
        return (self.rows * self.bits // WORD_BITS, self.columns)

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """Shape of a page's scales and zeros."""
        return (2, self.groups, self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of a packed page of one KV head: codes, scales and zeros."""
        codes = self.rows * self.columns * self.bits // 8
        return codes + 2 * self.rows * self.groups * SCALE_BYTES[self.scale_dtype]

    @property
    def stored_bits(self) -> float:
        """Stored bits per element: codes, scales and zeros."""
        return 8 * self.nbytes / (self.page * self.head_dim)
