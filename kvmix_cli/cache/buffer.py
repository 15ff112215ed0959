"""A tensor that grows along its token axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GROWTH = 1.25
"""Spare room when a buffer must move. Doubling would leave up to half of a compressed cache empty."""


class Buffer:
    """`[B, H_kv, n, ...]` with room to spare: appending copies what is new, and everything only once in a while.

    Args:
        reserve: room to allocate at the first append, when the final length is known.
    """

    def __init__(self, reserve: int = 0) -> None:
        self._reserve = reserve
        self._data: Tensor | None = None
        self.length = 0

    @property
    def view(self) -> Tensor:
        """What has been appended, `[B, H_kv, length, ...]`, without a copy."""
        if self._data is None:
            raise IndexError("an empty buffer has no shape yet")
        return self._data[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes in use."""
        return 0 if self._data is None else self.view.nbytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes held, with the spare room."""
        return 0 if self._data is None else self._data.nbytes

    def append(self, new: Tensor) -> None:
        """Add `new` `[B, H_kv, m, ...]` at the end. No gradient flows through a cache."""
        new = new.detach()
        self.room(new.shape, new.dtype, new.device).copy_(new)

    def room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make room for `[B, H_kv, m, ...]` at the end, and return it to be filled in."""
        first, self.length = self.length, self.length + shape[2]
        if self._data is None or self.length > self._data.shape[2]:
            self._move(shape, dtype, device, kept=first)
        return self._data[:, :, first : self.length]  # type: ignore[index]

    def drop_first(self, count: int) -> None:
        """Forget the oldest `count`; the rest moves to the front."""
        rest = self.view[:, :, count:]
        self._data[:, :, : rest.shape[2]] = rest.clone()  # type: ignore[index]
        self.length = rest.shape[2]

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length`."""
        self.length = min(self.length, length)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the content by `change` of it: batch selection, another device."""
        if self._data is not None:
            self._data = change(self._data)

    def _move(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, kept: int) -> None:
        """Move the first `kept` to where there is room for `length`."""
        capacity = max(self.length, self._reserve)
        if self._data is not None:
            capacity = max(capacity, int(self._data.shape[2] * GROWTH) + 1)
        data = torch.empty((*shape[:2], capacity, *shape[3:]), dtype=dtype, device=device)
        if self._data is not None:
            data[:, :, :kept] = self._data[:, :, :kept]
        self._data = data
