"""Falling back is allowed, silently falling back is not."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """Warn, the first time, that a combination has no fast path. The message names it."""
    warnings.warn(f"kvmix: {message}", stacklevel=3)
