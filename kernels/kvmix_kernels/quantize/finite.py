"""Detection of quantized pages that were not finite, without waiting for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


class FiniteWatch:
    """A watch over scales, which are not finite where pages had NaN, Inf or numbers too large for the scale dtype.

    On a CPU the answer is immediate. On a GPU it is gathered there and copied without waiting: `is_bad()` knows what
    has arrived by then, `is_bad(wait=True)` knows everything.
    """

    def __init__(self) -> None:
        self._is_bad = False
        self._gathered: Tensor | None = None  # on the GPU, of everything watched
        self._arrived: Tensor | None = None  # in pinned memory
        self._event: torch.cuda.Event | None = None  # when that has arrived; None if nothing is on its way

    def watch(self, scales: Tensor) -> bool:
        """Watch these scales too. Return what is known by now, which may not include these: see `is_bad`."""
        bad = ~torch.isfinite(scales).all()
        if _answers_at_once(scales.device):
            self._is_bad |= bool(bad)
            return self._is_bad
        self.is_bad()
        self._gathered = bad if self._gathered is None else self._gathered.to(bad.device) | bad
        if self._arrived is None:
            self._arrived = _pinned()
        self._arrived.copy_(self._gathered, non_blocking=True)
        self._event = _record(scales.device)
        return self._is_bad

    def is_bad(self, wait: bool = False) -> bool:
        """Return whether anything watched is known not to be finite; once it is, it stays so.

        Args:
            wait: wait for the GPU, so that everything is known.
        """
        if self._event is not None and self._arrived is not None and (wait or self._event.query()):
            self._event.synchronize()
            self._is_bad |= bool(self._arrived)
            self._event = None
        return self._is_bad

    def __getstate__(self) -> dict[str, object]:
        """Return the state for a copy, which waits and knows everything, because events cannot be copied."""
        return {**vars(FiniteWatch()), "_is_bad": self.is_bad(wait=True)}


def _answers_at_once(device: torch.device) -> bool:
    """Return whether reading a tensor there waits for nothing."""
    return device.type != "cuda"


def _pinned() -> Tensor:
    """Return host memory that a GPU copies to by itself."""
    return torch.zeros((), dtype=torch.bool, pin_memory=True)


def _record(device: torch.device) -> torch.cuda.Event:
    """Return an event after everything that has been asked of the device so far."""
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
