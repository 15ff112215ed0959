"""The machine and the versions of libraries behind a measurement, as plain data."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers

CPU_INFO = Path("/proc/cpuinfo")


def machine(device: torch.device) -> dict[str, str | int]:
    """Return the device's name, the number of threads on a CPU, and the versions of torch and transformers."""
    if device.type == "cuda":
        own: dict[str, str | int] = {"device": torch.cuda.get_device_name(device)}
    else:
        own = {"device": processor(), "threads": torch.get_num_threads()}
    return {**own, "torch": str(torch.__version__), "transformers": transformers.__version__}


def processor() -> str:
    """Return the CPU's name, or its kind where the system does not give the name."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
