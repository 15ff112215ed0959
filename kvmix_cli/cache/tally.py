"""A sum over queries, of which those of the last forward can be taken back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import pad


class Tally:
    """The sum of rows `[B, H, R, n]` over R; `n` may grow from one forward to the next."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._last: Tensor | None = None

    @property
    def total(self) -> Tensor | None:
        """`[B, H, n]`; None before anything was added."""
        return _plus(self._sum, self._last)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self._sum, self._last) if part is not None)

    def add(self, rows: Tensor, for_good: bool = False) -> None:
        """Add a forward's rows, which can be taken back unless they are `for_good`. Earlier ones are there to stay."""
        self._sum, self._last = _plus(self._sum, self._last), rows
        if for_good:
            self._sum, self._last = _plus(self._sum, rows), None

    def take_back(self, count: int) -> None:
        """Forget the last `count` rows, as far as they are of the last forward."""
        if self._last is not None:
            self._last = self._last[:, :, : max(0, self._last.shape[2] - count)]

    def narrow(self, start: int, stop: int | None = None) -> None:
        """Keep the columns `[start, stop)`."""
        self.apply(lambda part: part[..., start:stop])

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held by `change` of it: batch selection, another device."""
        self._sum, self._last = (part if part is None else change(part) for part in (self._sum, self._last))


def _plus(total: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """A sum with more rows in it."""
    if rows is None:
        return total
    more = rows.sum(2)
    return more if total is None else pad(total, (0, more.shape[2] - total.shape[2])) + more
