"""The native library for CPUs: compiled at first use, or missing with one warning."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import warnings

import torch

from .build import BuildError, build, library_path

WIDEST_VECTOR = 16
"""Lanes of the widest instruction set: what rows and groups must be a multiple of."""
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""`enum Dtype` of simd.h."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, compiled if need be; None, after a warning, where it cannot be had.

    `KVMIX_NATIVE=0` does without it, silently; `KVMIX_ISA=avx2` or `generic` asks for less than the processor has.
    """
    if os.environ.get("KVMIX_NATIVE") == "0":
        return None
    try:
        if not library_path().is_file():
            sys.stderr.write("kvmix: compiling its CPU kernels, once (some seconds)\n")
        loaded = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        warnings.warn(f"kvmix's CPU kernels are not available, falling back to slow PyTorch: {error}", stacklevel=2)
        return None
    loaded.kvmix_isa.restype = ctypes.c_char_p
    return loaded


def instruction_set() -> str:
    """`vnni`, `avx512`, `avx2`, `generic`, or `none` without the library."""
    loaded = library()
    return "none" if loaded is None else loaded.kvmix_isa().decode()


def use_instruction_set(name: str = "") -> str:
    """Use another instruction set that the processor has, or the best (`""`); returns the one in use. For tests."""
    loaded = library()
    if loaded is not None:
        loaded.kvmix_use(name.encode())
    return instruction_set()
