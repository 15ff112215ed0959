"""Storage that grows along its token axis, and that can be written whatever mode it was made in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

GROWTH = 1.25
"""Factor of the capacity when a buffer must move. Doubling would leave up to half of a compressed cache empty."""

P = ParamSpec("P")
R = TypeVar("R")


def lasting(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that makes tensors which the cache keeps.

    Tensors made under `torch.inference_mode()` can never be written outside it. A cache may be filled inside and used
    outside, so what it keeps is made in normal mode, and without gradients.
    """

    @wraps(function)
    def in_normal_mode(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():  # leaving inference mode switches gradients on
            return function(*args, **kwargs)

    return in_normal_mode


class Buffer:
    """A tensor `[B, H_kv, n, ...]` with spare room: appending copies the new part, and rarely everything.

    Args:
        reserve: room to allocate at the first append, when the final length is known.
    """

    def __init__(self, reserve: int = 0) -> None:
        self._reserve = reserve
        self._data: Tensor | None = None
        self._view: Tensor | None = None  # a slice costs more than most of what a decoding step does with it
        self.length = 0

    @property
    def view(self) -> Tensor:
        """Return everything appended so far, `[B, H_kv, length, ...]`, no copy: one object until it changes."""
        if self._view is None:
            if self._data is None:
                raise IndexError("an empty buffer has no shape yet")
            self._view = self._data[:, :, : self.length]
        return self._view

    @property
    def has_shape(self) -> bool:
        """Return whether anything has been appended yet."""
        return self._data is not None

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""
        return 0 if self._data is None else self.view.nbytes

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes held, spare room included."""
        return 0 if self._data is None else self._data.nbytes

    def append(self, new: Tensor) -> None:
        """Add `new` `[B, H_kv, m, ...]` at the end. No gradient flows through a cache."""
        new = new.detach()
        self.room(new.shape, new.dtype, new.device).copy_(new)

    def room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make room for `[B, H_kv, m, ...]` at the end and return it, to be filled in."""
        first, length = self.length, self.length + shape[2]
        if self._data is None or length > self._data.shape[2]:
            self._data = self._moved(length, shape, dtype, device)
        self.length, self._view = length, None
        return self._data[:, :, first:length]

    def hold(self, content: Tensor) -> None:
        """Take a tensor `[B, H_kv, n, ...]` as the content, without a copy; it has no spare room."""
        self._data, self.length, self._view = content, content.shape[2], None

    def drop_first(self, count: int) -> None:
        """Forget the oldest `count`; the rest moves to the front."""
        rest = self.view[:, :, count:].clone()
        self.truncate(rest.shape[2])
        self.view.copy_(rest)

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length`."""
        self.length, self._view = min(self.length, length), None

    @lasting
    def select(self, places: Tensor) -> None:
        """Keep what is at `places` `[B, H_kv, m]` of the third axis only, in this order, without spare room."""
        view = self.view
        index = places.reshape(*places.shape, *[1] * (view.ndim - 3)).expand(*places.shape, *view.shape[3:])
        self.hold(view.gather(2, index))

    @lasting
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the content by `change` of it: a selection of the batch, another device."""
        if self._data is not None:
            self._data, self._view = change(self._data), None

    @lasting
    def _moved(self, length: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        capacity = max(length, self._reserve)
        if self._data is not None:
            capacity = max(capacity, int(self._data.shape[2] * GROWTH) + 1)
        data = torch.empty((*shape[:2], capacity, *shape[3:]), dtype=dtype, device=device)
        if self._data is not None:
            data[:, :, : self.length] = self.view
        return data
