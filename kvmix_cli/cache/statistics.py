"""Statistics over the queries of all forwards, from which those of the last forward can be taken back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from .archive import Archive
from .buffer import lasting

Reduction = Literal["sum", "max"]
"""Weights of several queries, and of the query heads of a group, are summed, or their maximum is taken."""


class _ForwardRows(ABC):
    """Rows `[B, H, R, n]` of queries, of which those of the last forward can be taken back.

    `n` may grow from one forward to the next.
    """

    def __init__(self) -> None:
        self._earlier: Tensor | None = None
        self._last: Tensor | None = None

    @abstractmethod
    def _kept(self) -> Tensor | None:
        """Return what is kept of all rows; None before anything was added."""

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        return sum(part.nbytes for part in (self._earlier, self._last) if part is not None)

    @lasting
    def start(self, kept: Tensor) -> None:
        """Go on from what was kept of earlier rows, of which nothing can be taken back."""
        self._earlier, self._last = kept.detach(), None

    @lasting
    def add(self, rows: Tensor, final: bool = False) -> None:
        """Add a forward's rows; those of earlier ones can no longer be taken back, nor these if they are `final`."""
        self._earlier, self._last = self._kept(), rows.detach()
        if final:
            self._earlier, self._last = self._kept(), None

    def take_back(self, count: int) -> None:
        """Forget the last `count` rows, as far as they are of the last forward."""
        if self._last is not None:
            self._last = self._last[:, :, : max(0, self._last.shape[2] - count)]

    def narrow(self, start: int, stop: int | None = None) -> None:
        """Keep the columns `[start, stop)`."""
        self.apply(lambda part: part[..., start:stop].clone())  # a view would keep those of a whole prompt

    @lasting
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held by `change` of it: a selection of the batch, another device."""
        self._earlier, self._last = (part if part is None else change(part) for part in (self._earlier, self._last))


class QuerySum(_ForwardRows):
    """A sum over queries of rows, `[B, H, n]`.

    Args:
        reduce: the sum, or the maximum, which starts from 0.
    """

    def __init__(self, reduce: Reduction = "sum") -> None:
        super().__init__()
        self._reduce: Reduction = reduce

    @property
    def total(self) -> Tensor | None:
        """Return the sum `[B, H, n]`; None before anything was added."""
        return _plus(self._earlier, self._last, self._reduce)

    def exchange(self, archive: Archive) -> None:
        """Give the sum to an archive, or take it from one."""
        batch = archive.rows[0]
        self._earlier = archive.tensor("earlier", self._earlier, (batch, None, None), torch.float32)
        self._last = archive.tensor("last", self._last, (batch, None, None, None), torch.float32)

    def _kept(self) -> Tensor | None:
        return self.total


class LastRows(_ForwardRows):
    """Rows of the last queries.

    Args:
        count: rows that count, the last ones.
        reduce: what becomes of them.
    """

    def __init__(self, count: int, reduce: Reduction) -> None:
        super().__init__()
        self._count = count
        self._reduce: Reduction = reduce

    @property
    def total(self) -> Tensor | None:
        """Return the sum, or the maximum, of the rows that count, `[B, H, n]`; None before any was added."""
        return None if self.rows is None else reduced(self.rows, self._reduce)

    @property
    def rows(self) -> Tensor | None:
        """Return the rows that count, or as many as there are; None before any was added."""
        earlier, last = self._earlier, self._last
        if earlier is None or last is None:
            rows = last if earlier is None else earlier
            return None if rows is None else rows[:, :, max(0, rows.shape[2] - self._count) :]
        new = last[:, :, max(0, last.shape[2] - self._count) :]
        old = earlier[:, :, max(0, earlier.shape[2] + new.shape[2] - self._count) :]
        return torch.cat([pad(old, (0, new.shape[3] - old.shape[3])), new], dim=2)

    def exchange(self, archive: Archive) -> None:
        """Give the rows to an archive, or take them from one."""
        shape = (archive.rows[0], None, None, None)
        self._earlier = archive.tensor("earlier", self._earlier, shape, torch.float32)
        self._last = archive.tensor("last", self._last, shape, torch.float32)

    def _kept(self) -> Tensor | None:
        return self.rows


class RunningMean:
    """A mean over recent queries of rows `[B, H, R, n]`, from which rows of the last forward can be taken back.

    It is the same whether queries come in one forward or in several, but for those that share a row.

    Args:
        horizon: queries that a mean is over: each moves it by this share towards its own row.
        mean: `[B, H, n]` float32, to go on from.
    """

    def __init__(self, horizon: int, mean: Tensor) -> None:
        self._horizon = horizon
        self._earlier = mean
        self._last: Tensor | None = None
        self._queries = 0  # that one row of the last forward stands for

    @property
    def mean(self) -> Tensor:
        """Return the mean `[B, H, n]`."""
        if self._last is None or not self._last.shape[2]:
            return self._earlier
        rows = self._last.shape[2]
        keeps = (1 - 1 / self._horizon) ** self._queries  # what a row leaves of the mean before it
        shares = [(1 - keeps) * keeps ** (rows - 1 - row) / self._queries for row in range(rows)]
        return keeps**rows * self._earlier + torch.einsum("bhrn,r->bhn", self._last, self._last.new_tensor(shares))

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        return sum(part.nbytes for part in (self._earlier, self._last) if part is not None)

    @lasting
    def start(self, mean: Tensor) -> None:
        """Go on from a mean `[B, H, n]`, of which nothing can be taken back."""
        self._earlier, self._last = mean.detach(), None

    @lasting
    def add(self, rows: Tensor, queries: int) -> None:
        """Add a forward's rows, each the sum over `queries` queries; what was added before becomes final."""
        self._earlier, self._last, self._queries = self.mean, rows.detach(), queries

    def take_back(self, count: int) -> None:
        """Forget the last `count` rows, as far as they are of the last forward and of one query each."""
        if self._last is not None and self._queries == 1:
            self._last = self._last[:, :, : max(0, self._last.shape[2] - count)]

    def exchange(self, archive: Archive, shape: Sequence[int]) -> None:
        """Give the mean of `shape` `[B, H, n]` to an archive, or take it from one."""
        self._queries = archive.number("queries", self._queries)
        batch, heads, count = shape
        self._earlier = archive.array("earlier", self._earlier, shape, torch.float32)
        self._last = archive.tensor("last", self._last, (batch, heads, None, count), torch.float32)

    @lasting
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held by `change` of it: a selection of the batch, another device."""
        self._earlier = change(self._earlier)
        self._last = self._last if self._last is None else change(self._last)


def _plus(total: Tensor | None, rows: Tensor | None, reduce: Reduction) -> Tensor | None:
    if rows is None:
        return total
    more = reduced(rows, reduce)
    return more if total is None else combined(pad(total, (0, more.shape[2] - total.shape[2])), more, reduce)


def combined(one: Tensor, other: Tensor, reduce: Reduction) -> Tensor:
    """Return the sum, or the maximum, of two rows."""
    return torch.maximum(one, other) if reduce == "max" else one + other


def beside(one: Tensor, other: Tensor) -> Tensor:
    """Return rows `[B, H, R, n]` and `[B, H, S, m]` of the same last queries in one, `[B, H, max(R, S), n + m]`."""
    count = max(one.shape[2], other.shape[2])
    return torch.cat([pad(rows, (0, 0, count - rows.shape[2], 0)) for rows in (one, other)], dim=3)


def reduced(rows: Tensor, reduce: Reduction) -> Tensor:
    """Return the sum, or the maximum, over the third axis; 0 of no rows."""
    return rows.amax(2) if reduce == "max" and rows.shape[2] else rows.sum(2)
