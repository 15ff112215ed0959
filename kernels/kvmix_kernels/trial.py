"""A GPU kernel's results are used after it has solved a small random problem as the definition does.

What is compiled by itself is tried by itself, when it first comes. The trial compiles the kernel that is then used, so
it costs little more than what is due anyway.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from .fallback import warn_once

SEED = 20250608


def is_due() -> bool:
    """Whether kernels are tried: not where `KVMIX_TRITON=1` takes them as they are, nor amid a CUDA graph's capture."""
    return os.environ.get("KVMIX_TRITON") != "1" and not _is_capturing()


def passes(name: str, failure: Callable[[], str | None]) -> bool:
    """Whether a trial finds nothing wrong; if it does, one warning names it.

    Args:
        name: of what is tried.
        failure: runs the trial, and says what is wrong with the result.
    """
    try:
        reason = failure()
    except Exception as error:  # noqa: BLE001  whatever a compiler or a driver raises, PyTorch can do it
        reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"
    if reason is not None:
        warn_once(f"{name} fails its trial on this GPU, falling back to slow PyTorch: {reason}")
    return reason is None


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
