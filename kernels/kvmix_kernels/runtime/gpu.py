"""Check that a device can run the Triton kernels."""

from __future__ import annotations

import functools
import os

import torch

from .fallback import warn_once

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16."""


@functools.cache
def is_usable(device: torch.device) -> bool:
    """Return whether this device is an NVIDIA GPU that is new enough, with a Triton that is new enough.

    If something is missing, one warning names it. `KVMIX_TRITON=0` turns the kernels off.
    """
    if device.type != "cuda" or os.environ.get("KVMIX_TRITON") == "0":
        return False
    reason = _missing(device)
    if reason is not None:
        warn_once(f"the GPU kernels are not available, falling back to slow PyTorch: {reason}")
    return reason is None


def _missing(device: torch.device) -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if torch.version.cuda is None:
        return "they are for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no bfloat16 tensor cores"
    return None
