"""What a number was measured on and with, as plain data."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers

CPU_INFO = Path("/proc/cpuinfo")


def machine(device: torch.device) -> dict[str, str | int]:
    """The device's name, how many threads work on it if it is a CPU, and the versions that matter."""
    if device.type == "cuda":
        own: dict[str, str | int] = {"device": torch.cuda.get_device_name(device)}
    else:
        own = {"device": _processor(), "threads": torch.get_num_threads()}
    return {**own, "torch": str(torch.__version__), "transformers": transformers.__version__}


def _processor() -> str:
    """The CPU's name; where the system does not say it, its kind."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
