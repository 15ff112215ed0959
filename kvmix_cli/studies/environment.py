"""What kvmix runs on: versions, devices, kernels, threads and folders, and what is missing, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .. import state
from .._version import __version__

PACKAGES = ("torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy", "scipy", "triton")
"""Packages that kvmix needs."""
OPTIONAL = {
    "lm-eval": ("eval", "LongBench and the tasks of lm-eval"),
    "optimum-quanto": ("baselines", "the caches hf-quanto-*"),
    "hqq": ("baselines", "the caches hf-hqq-*"),
    "accelerate": ("multi-gpu", "--device map, and GGUF files"),
    "gguf": ("gguf", "GGUF files"),
    "peft": ("lora", "LoRA adapters"),
    "pillow": ("images", "run --image"),
    "torchvision": ("images", "run --image with many models"),
}
"""Packages that something needs: the extra that brings each, and what it is for."""
MEMORY = Path("/proc/meminfo")

T = TypeVar("T")


@dataclass(frozen=True)
class Environment:
    """Versions, devices, kernels, threads and folders, as plain data.

    Attributes:
        versions: of Python, kvmix and packages by name; None for what is not installed.
        devices: name, kind and memory of each.
        kernels: of the CPU and of GPUs: what is in use.
        threads: numbers by what sets them.
        folders: places of files.
        missing: what is missing, what it is for, and how to get it.
    """

    versions: dict[str, str | None]
    devices: list[dict[str, Any]]
    kernels: dict[str, Any]
    threads: dict[str, Any]
    folders: dict[str, str]
    missing: list[dict[str, str]]


def read_environment() -> Environment:
    """Return what kvmix runs on. Loads torch, and compiles the native library if it has not been yet."""
    import torch

    versions = {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    versions = {"kvmix": __version__, "python": sys.version.split()[0], "system": platform.platform(), **versions}
    kernels = {"cpu": _native(), "gpu": _triton()}
    return Environment(
        versions=versions,
        devices=[_processor(), *_gpus()],
        kernels=kernels,
        threads={
            "torch": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        },
        folders=_folders(),
        missing=list(_missing(versions, kernels)),
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    from ..evaluation.machine import processor

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"kind": "cpu", "name": processor(), "processors": usable, "memory_bytes": _memory()}


def _memory() -> int | None:
    try:
        lines = MEMORY.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal:")), None)


def _gpus() -> Iterator[dict[str, Any]]:
    import torch

    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"{found.major}.{found.minor}"
        yield {"kind": "cuda", "name": found.name, "memory_bytes": found.total_memory, "capability": capability}


def _native() -> dict[str, Any]:
    """Return the instruction set of the native library, or why there is no library."""
    from kvmix_kernels.runtime.native import instruction_set

    name, reason = _with_reason(instruction_set)
    if name != "none":
        return {"in_use": name}
    return {"in_use": None, "reason": reason or "KVMIX_NATIVE=0 turns it off"}


def _triton() -> dict[str, Any]:
    """Return whether Triton's kernels are used, or why not."""
    import torch
    from kvmix_kernels.runtime.gpu import is_usable

    if not torch.cuda.is_available():
        return {"in_use": None, "reason": "no NVIDIA GPU that this torch can use"}
    usable, reason = _with_reason(lambda: is_usable(torch.device("cuda")))
    if usable:
        return {"in_use": "triton"}
    return {"in_use": None, "reason": reason or "KVMIX_TRITON=0 turns them off"}


def _with_reason(find: Callable[[], T]) -> tuple[T, str | None]:
    """Return what is found, and why it is less than what was meant; other libraries' warnings are no reason."""
    from kvmix_kernels.runtime.fallback import FallbackWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = find()
    return found, next((str(each.message) for each in caught if isinstance(each.message, FallbackWarning)), None)


def _folders() -> dict[str, str]:
    from huggingface_hub import constants
    from kvmix_kernels.runtime.native.cache import cache_dir

    return {
        "profiles": str(state.profiles_dir().absolute()),
        "models": constants.HF_HUB_CACHE,
        "kernels": str(cache_dir()),
    }


def _missing(versions: dict[str, str | None], kernels: dict[str, Any]) -> Iterator[dict[str, str]]:
    for name, (extra, what) in OPTIONAL.items():
        if versions[name] is None:
            yield {"what": name, "for": what, "get": f"pip install 'kvmix[{extra}]'"}
    if kernels["cpu"]["in_use"] is None:
        yield {"what": "CPU kernels", "for": "fast attention on a CPU", "get": kernels["cpu"]["reason"]}
