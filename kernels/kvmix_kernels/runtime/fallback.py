"""Warnings for combinations without a fast path: falling back is allowed, falling back silently is not."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_once(message: str) -> None:
    """Warn, the first time only, that a combination has no fast path; the message names the combination."""
    warnings.warn(f"kvmix: {message}", stacklevel=3)
