"""Trials of GPU kernels: each solves a small random problem as the definition does before its results are used.

Each kind of problem that Triton compiles by itself is tried by itself, when it first comes. The trial compiles the
kernel that is used afterwards, so it costs little more than the compilation that is needed anyway.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from .fallback import warn_once

SEED = 20250608


def is_due() -> bool:
    """Return whether kernels are tried: not under `KVMIX_TRITON=1`, and not while a CUDA graph is captured."""
    return os.environ.get("KVMIX_TRITON") != "1" and not _is_capturing()


def passes(name: str, failure: Callable[[], str | None]) -> bool:
    """Return whether a trial finds nothing wrong; if it does, one warning names it.

    Args:
        name: of what is tried.
        failure: runs the trial and returns what is wrong with the result, or None.
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
