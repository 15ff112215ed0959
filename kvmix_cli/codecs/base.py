"""The base of page codecs, and the count of their bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Final

from kvmix_kernels.layout import BITS, Kind

if TYPE_CHECKING:
    from torch import Tensor

ELEMENT_BYTES: Final = {"uint8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "float32": 4}
"""Types that a codec may store."""


@dataclass(frozen=True)
class StoredPart:
    """One of the tensors that a codec stores of a page.

    Attributes:
        shape: of a page of one KV head.
        dtype: name of the type, one of `ELEMENT_BYTES`.
    """

    shape: tuple[int, ...]
    dtype: str = "uint8"

    @property
    def nbytes(self) -> int:
        """Return the bytes of a page."""
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class PageCodec(ABC):
    """Storage of pages of keys, or of values: subclass it, and register the subclass in `CODECS`.

    Pages are encoded once, when they leave the window. Attention decodes them, a bounded number at a time: no kernel
    knows the codes of a codec, but for those of vectors on a CPU. Its bytes are counted from `parts`.

    Attributes:
        kind: `"key"` or `"value"`.
        bits: width of the layer; the nominal bits.
        head_dim: channels of a KV head.
        page: tokens of a page, a multiple of 16.
        group_size: elements that share a scale, for codecs that have groups; None for a whole row.
        scale_dtype: type of scales.

    Raises:
        ValueError: from a subclass, for a page that it cannot store.
    """

    kind: Kind
    bits: int
    head_dim: int
    page: int
    group_size: int | None = None
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError for a page that the codec cannot store; a subclass may refuse more."""
        if self.bits not in BITS:
            raise ValueError(f"bits must be one of {BITS}, got {self.bits!r}")

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, StoredPart]:
        """Return what is stored of a page of one KV head, by name."""

    @abstractmethod
    def encode(self, pages: Tensor) -> Mapping[str, Tensor]:
        """Return the parts `[..., *shape]` of finite pages `[..., page, head_dim]`, float32."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return pages `[..., page, head_dim]`, float32, from their parts."""

    @classmethod
    def learned(cls) -> type[PageCodec]:
        """Return the codec with codebooks that a plan gives it. Raises ValueError for a codec that takes none."""
        raise ValueError(f"the codec {cls.__name__} has no codebook that a plan could give it; use vectors")

    @property
    def constant(self) -> Tensor | None:
        """Return a table that saved caches must find again, such as a codebook; None for none."""
        return None

    @property
    def nbytes(self) -> int:
        """Return the bytes of a page of one KV head."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def stored_bits(self) -> float:
        """Return stored bits per element: everything that a page has."""
        return 8 * self.nbytes / (self.page * self.head_dim)

    @property
    def code_bytes(self) -> int:
        """Return the bytes of codes of `bits` bits for every element of a page."""
        return self.page * self.head_dim * self.bits // 8
