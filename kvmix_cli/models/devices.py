"""Devices and dtypes by the names that users give them."""

from __future__ import annotations

import importlib.util

import torch

from ..errors import ModelError, did_you_mean
from ..ranks import ALONE, Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SPREAD = "map"
"""The device name that spreads a model over all devices."""


def find_device(name: str, ranks: Ranks = ALONE) -> str:
    """Return the name of a torch device, or `map`; `auto` becomes CUDA where there is any, one device a rank.

    Raises:
        ModelError: if there is no such device here.
    """
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    if ranks.world > 1 and name == SPREAD:
        raise ModelError("--device map gives all GPUs to one process: use auto, or leave out torchrun")
    if ranks.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{ranks.local % torch.cuda.device_count()}"
    if name == "auto":
        if torch.cuda.device_count() > 1 and has_accelerate:
            return SPREAD
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == SPREAD:
        if not has_accelerate:
            raise ModelError("--device map spreads a model with accelerate: pip install 'kvmix[multi-gpu]'")
        return name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"no device '{name}' here: use auto, cpu, cuda or map") from error
    return name


def find_dtype(name: str | torch.dtype) -> torch.dtype | str:
    """Return a dtype by its name, `auto` (the checkpoint's) as it is. Raises ModelError for one that no model is in."""
    name = str(name).removeprefix("torch.")
    name = ALIASES.get(name, name)
    if name == "auto":
        return name
    if name not in DTYPES:
        known = ["auto", *DTYPES]
        raise ModelError(f"unknown dtype '{name}'{did_you_mean(name, known)}: use {', '.join(known)}")
    return DTYPES[name]
