"""Warnings for combinations without a fast path: falling back is allowed, falling back silently is not."""

from __future__ import annotations

import functools
import warnings


class FallbackWarning(UserWarning):
    """A warning that something slower or less good is done than what was meant; its message names why."""


@functools.cache
def warn_once(message: str) -> None:
    """Warn, the first time only, that a combination has no fast path; the message names the combination."""
    warnings.warn(f"kvmix: {message}", FallbackWarning, stacklevel=3)
