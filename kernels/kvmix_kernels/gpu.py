"""Whether the Triton kernels can be used."""

from __future__ import annotations

import functools
import os

import torch

from . import trial
from .fallback import warn_once

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16."""


@functools.cache
def is_usable(device: torch.device) -> bool:
    """Whether kernels run on this device: it is an NVIDIA GPU, new enough, Triton is there, and a few trials pass.

    Where one is missing, there is one warning. `KVMIX_TRITON=0` does without kernels, and `KVMIX_TRITON=1` without
    trials.
    """
    if device.type != "cuda" or os.environ.get("KVMIX_TRITON") == "0":
        return False
    reason = _missing(device)
    if reason is not None:
        warn_once(f"the GPU kernels are not available, falling back to slow PyTorch: {reason}")
        return False
    return not trial.is_due() or _passes(device)


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


def _passes(device: torch.device) -> bool:
    """Whether a handful of small problems comes out right. The first that does not is warned of."""
    from .attend.triton import trial as attending
    from .quantize import trial as quantizing

    return all(quantizing.passes(device, layout, torch.float32) for layout in quantizing.first_layouts()) and all(
        attending.passes(kind) for kind in attending.first_kinds(device)
    )
