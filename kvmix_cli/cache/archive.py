"""The names under which the pieces of a cache are kept in a file.

Every piece has one method, `exchange`, which names its tensors and numbers. It serves both ways: the piece of a full
cache gives them to an archive, and that of an empty one takes them from it, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheError
from .buffer import Buffer

Shape = Sequence[int | None]
"""A shape, with None for any number."""


@dataclass(frozen=True)
class Archive:
    """Tensors and facts of a cache by name, being collected for a file or taken from one.

    What is taken is checked: a file may be damaged.

    Attributes:
        source: the file, for errors.
        tensors, facts: everything that has been collected, or that nobody has taken yet; facts are plain data.
        is_reading: pieces take what is here; otherwise they give what they have.
        tokens: of each sequence.
        example: keys or values `[B, H_kv, 0, D]` of the layer in hand, in the model's dtype and on its device.
        prefix: begins the names of this part.
    """

    source: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    is_reading: bool
    tokens: int
    example: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0, 0), repr=False)
    prefix: str = ""

    @property
    def rows(self) -> tuple[int, int]:
        """Return the number of sequences and of KV heads."""
        return self.example.shape[0], self.example.shape[1]

    def part(self, name: str, example: Tensor | None = None) -> Archive:
        """Return the same archive for a piece of the piece in hand."""
        return replace(self, prefix=f"{self.prefix}{name}.", example=self.example if example is None else example)

    def fact(self, name: str, value: Any) -> Any:
        """Give plain data, or return what the file has in its place."""
        key = self.prefix + name
        if not self.is_reading:
            self.facts[key] = value
        elif key in self.facts:
            return self.facts.pop(key)
        else:
            raise self.fault(name, "is missing")
        return value

    def number(self, name: str, value: int) -> int:
        """Give a number that is not negative, or return the file's."""
        found = self.fact(name, int(value))
        if type(found) is not int or found < 0:
            raise self.fault(name, f"is {found!r}; expected a number from 0 on")
        return found

    def dtype(self, name: str, value: torch.dtype) -> torch.dtype:
        """Give a dtype, or return the file's."""
        found = getattr(torch, self.fact(name, str(value).removeprefix("torch.")), None)
        if not isinstance(found, torch.dtype):
            raise self.fault(name, "is no dtype")
        return found

    def same(self, name: str, value: int, why: str) -> None:
        """Give a number that must be the same when the file is read. Raises CacheError with the reason if it is not."""
        if self.number(name, value) != value:
            raise CacheError(f"cache file {self.source}: {why}")

    def tensor(self, name: str, value: Tensor | None, shape: Shape | None, dtype: torch.dtype | None) -> Tensor | None:
        """Give a tensor, or return the file's on the layer's device; None if there is none.

        Args:
            shape, dtype: those it must have; None for any.
        """
        key = self.prefix + name
        found = self.tensors.pop(key, None) if self.is_reading else value
        if found is None:
            return None
        if dtype not in (None, found.dtype) or (shape is not None and not _fits(found.shape, shape)):
            expected = f"{dtype} [{', '.join('any' if size is None else str(size) for size in shape or ())}]"
            raise self.fault(name, f"is {found.dtype} {list(found.shape)}; expected {expected}")
        if not self.is_reading:
            self.tensors[key] = found
            return found
        return found.to(self.example.device)

    def array(self, name: str, value: Tensor | None, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Give a tensor, or return the file's, as `tensor` does. Raises CacheError if there is none."""
        found = self.tensor(name, value, shape, dtype)
        if found is None:
            raise self.fault(name, "is missing")
        return found

    def buffer(
        self, name: str, buffer: Buffer, shape: Shape, dtype: torch.dtype | None = None, below: int | None = None
    ) -> None:
        """Give the content of a buffer, or fill it with the file's tensor, without a copy.

        Args:
            shape: `[B, H_kv, n, ...]`; None for any number.
            dtype: None for the model's.
            below: what all of its numbers are below, for indices; None for no indices.
        """
        dtype = self.example.dtype if dtype is None else dtype
        found = self.tensor(name, buffer.view if buffer.has_shape else None, shape, dtype)
        if not self.is_reading:
            return
        if found is None and shape[2]:
            raise self.fault(name, "is missing")
        if found is not None:
            if below is not None and found.numel() and not 0 <= int(found.min()) <= int(found.max()) < below:
                raise self.fault(name, f"has indices up to {int(found.max())}; expected 0 to {below - 1}")
            buffer.hold(found)

    def fault(self, name: str, why: str) -> CacheError:
        """Return the error for a part of the file that cannot be used."""
        if self.is_reading:
            return CacheError(f"cache file {self.source} is damaged: {self.prefix}{name} {why}; save it again")
        return CacheError(f"this cache cannot be saved: {self.prefix}{name} {why}")


def _fits(found: Sequence[int], shape: Shape) -> bool:
    return len(found) == len(shape) and all(want in (None, got) for want, got in zip(shape, found, strict=True))
