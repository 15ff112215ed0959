"""Keeping the libraries underneath quiet, so that the terminal shows kvmix's own lines. No torch.

`kvmix -v` sets the logger named "kvmix" to INFO, and then nothing is silenced.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = ("transformers", "huggingface_hub", "datasets", "accelerate")


def verbose() -> bool:
    """Whether the libraries may speak."""
    return logging.getLogger("kvmix").isEnabledFor(logging.INFO)


@contextmanager
def hushed() -> Iterator[None]:
    """Within this block the libraries log errors only; their levels are put back after it."""
    loggers = [] if verbose() else [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
