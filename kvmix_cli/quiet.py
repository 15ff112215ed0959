"""Silence of the libraries underneath, so that the terminal shows kvmix's own lines. No torch.

`kvmix -v` sets the logger named "kvmix" to INFO, and then nothing is silenced.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = ("transformers", "huggingface_hub", "datasets", "accelerate")


def verbose() -> bool:
    """Return whether the libraries may log."""
    return logging.getLogger("kvmix").isEnabledFor(logging.INFO)


@contextmanager
def hushed() -> Iterator[None]:
    """Within this block let the libraries log errors only; their levels are restored after it."""
    loggers = [] if verbose() else [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def mute_stdout() -> Iterator[None]:
    """Within this block drop what compiled code prints, so that it never ends up in the result of a command.

    HiGHS 1.12 prints a line at random, whatever its options say (ERGO-Code/HiGHS#2783).
    """
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
