"""Pieces of work that several processes share: each does those that no other process is at, and waits for the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from .errors import InUseError

T = TypeVar("T")

PAUSE = 0.25
"""Seconds between two looks at work that other processes are at."""
_LOG = logging.getLogger("kvmix")


def take_turns(works: Sequence[Callable[[], T]]) -> list[T]:
    """Return the results of all pieces of work, in their order.

    A piece raises InUseError while another process is at it. The next one is done then, and it is tried again
    afterwards. A process that is killed releases its locks, so that its work is done by one that is still there.
    """
    results: dict[int, T] = {}

    def do(number: int) -> None:
        results[number] = works[number]()

    while left := [number for number in range(len(works)) if number not in results]:
        first_free([partial(do, number) for number in left])
    return [results[number] for number in range(len(works))]


def first_free(works: Sequence[Callable[[], T]]) -> T:
    """Return the result of the first piece of work that no other process is at, once there is one."""
    while True:
        for work in works:
            try:
                return work()
            except InUseError as error:
                busy = error
        _LOG.info("%s", busy)
        time.sleep(PAUSE)
