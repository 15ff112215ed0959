"""A tensor that grows along its token axis."""

from __future__ import annotations

from collections.abc import Callable

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
        needed = self.length + new.shape[2]
        if self._data is None or needed > self._data.shape[2]:
            self._move(new, needed)
        self._data[:, :, self.length : needed] = new  # type: ignore[index]
        self.length = needed

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

    def _move(self, new: Tensor, needed: int) -> None:
        capacity = max(needed, self._reserve)
        if self._data is not None:
            capacity = max(capacity, int(self._data.shape[2] * GROWTH) + 1)
        data = torch.empty((*new.shape[:2], capacity, *new.shape[3:]), dtype=new.dtype, device=new.device)
        if self._data is not None:
            data[:, :, : self.length] = self.view
        self._data = data
