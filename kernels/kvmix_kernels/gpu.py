"""Whether the Triton kernels can be used."""

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
    """Whether kernels run on this device: it is an NVIDIA GPU, new enough, and Triton is there.

    They have never run on a GPU, so they must be asked for with `KVMIX_TRITON=1`. A GPU without them gets one warning,
    or none with `KVMIX_TRITON=0`.
    """
    wanted = os.environ.get("KVMIX_TRITON")
    if device.type != "cuda" or wanted == "0":
        return False
    reason = _missing(device) if wanted == "1" else "not verified on a GPU yet; KVMIX_TRITON=1 takes them all the same"
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
