"""Which tokens are of an image: told to a layer before they come, and kept until they are sorted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..archive import Archive
from ..buffer import lasting


class ImageLabels:
    """Labels `[B, n]` of the tokens from one place of the cache on; tokens that nothing was told of are text."""

    def __init__(self) -> None:
        self._first = 0
        self._labels: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes held, one a token."""
        return 0 if self._labels is None else self._labels.nbytes

    @lasting
    def arrive(self, batch: int, count: int, told: Tensor | None, device: torch.device) -> None:
        """Add the labels of `count` tokens that have come, of which the first ones may be told, `[B, m]` bool."""
        new = torch.zeros(batch, count, dtype=torch.bool, device=device)
        if told is not None:
            new[:, : told.shape[1]] = told
        self._labels = new if self._labels is None else torch.cat([self._labels, new], dim=1)

    def of(self, start: int, count: int) -> Tensor:
        """Return the labels `[B, count]` of the tokens from place `start` on."""
        if self._labels is None:
            raise AssertionError("tokens have arrived")
        return self._labels[:, start - self._first : start - self._first + count]

    @lasting
    def forget_before(self, start: int) -> None:
        """Forget the labels of the tokens before place `start`."""
        if self._labels is not None and start > self._first:
            self._labels, self._first = self._labels[:, start - self._first :].clone(), start

    @lasting
    def crop(self, tokens: int, first: int) -> None:
        """Go back to `tokens` in all; those from place `first` on wait, and are text if their labels are forgotten."""
        if self._labels is None:
            return
        kept = self._labels[:, : max(0, tokens - self._first)]
        missing = max(0, min(self._first, tokens) - first)
        self._labels = torch.cat([kept.new_zeros(kept.shape[0], missing), kept], dim=1)
        self._first = min(self._first, first)

    def exchange(self, archive: Archive) -> None:
        """Give the labels to an archive, or take them from one."""
        self._first = archive.number("first", self._first)
        self._labels = archive.tensor("labels", self._labels, (archive.rows[0], None), torch.bool)

    @lasting
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to the labels."""
        self._labels = None if self._labels is None else change(self._labels)
