"""The native library for CPUs: compiled at first use, checked whenever it is loaded, or missing with one warning."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import warnings
from pathlib import Path

from ..fallback import FallbackWarning
from . import cache
from .build import BuildError
from .cache import LibraryError
from .processor import available, wanted
from .structs import mismatch

FUNCTIONS = (
    "kvmix_attend",
    "kvmix_choose",
    "kvmix_quantize",
    "kvmix_encode",
    "kvmix_code",
    "kvmix_place",
    "kvmix_store",
)
"""Functions of the library that take a struct each."""
LOG = logging.getLogger("kvmix")
"""Logger of the message that compiling begins, at level WARNING: without a handler Python writes it to stderr."""


_in_use = ""  # what use_instruction_set has asked for


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library, compiled if need be; None, after a warning, where it cannot be had.

    A library on disk that is damaged, that others may have written, or that does not fit this package is compiled
    again, once. `KVMIX_NATIVE=0` does without the library, silently; `KVMIX_ISA=avx2` or `generic` asks for less than
    the processor has.
    """
    return library_for(_in_use or wanted())


def instruction_set() -> str:
    """Return `vnni`, `avx512`, `avx2`, `generic`, or `none` without the library."""
    loaded = library()
    return "none" if loaded is None else bytes(loaded.kvmix_isa()).decode()


def use_instruction_set(name: str = "") -> str:
    """Use another instruction set that the processor has, or the best (`""`); return the one in use. For tests."""
    global _in_use
    _in_use = name if name in available() else ""
    library.cache_clear()
    return instruction_set()


@functools.cache
def library_for(isa: str) -> ctypes.CDLL | None:
    """Return the library for an instruction set that the processor has; see `library`."""
    if os.environ.get("KVMIX_NATIVE") == "0":
        return None
    try:
        return _load_or_build(isa)
    except (BuildError, LibraryError, OSError) as error:
        message = f"kvmix's CPU kernels are not available, falling back to slow PyTorch: {error}"
        warnings.warn(message, FallbackWarning, stacklevel=3)
        return None


def _load_or_build(isa: str) -> ctypes.CDLL:
    try:
        return _load(cache.find(cache.entry(isa)), isa)
    except (FileNotFoundError, NotADirectoryError):
        LOG.warning("kvmix: compiling its CPU kernels, once (some seconds)")
        return _load(cache.install(isa), isa)
    except LibraryError as error:
        LOG.warning("kvmix: compiling its CPU kernels again (some seconds): %s", error)
        try:
            return _load(cache.install(isa), isa)
        except BuildError as failure:
            raise BuildError(f"{error}, and it cannot be compiled again: {failure}") from failure


def _load(path: Path, isa: str) -> ctypes.CDLL:
    """Load a library, and check that it has every function, and structs as Python fills them.

    Raises:
        LibraryError: if it cannot be loaded, lacks a function, has another struct, or is for another instruction set.
    """
    try:
        loaded = ctypes.CDLL(str(path))
        for name in FUNCTIONS:
            getattr(loaded, name).restype = None
        loaded.kvmix_isa.restype = loaded.kvmix_structs.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} cannot be loaded ({error})") from error
    difference = mismatch(bytes(loaded.kvmix_structs()).decode())
    if difference is not None:
        raise LibraryError(f"{path} does not fit this version of kvmix: {difference}")
    if (made_for := bytes(loaded.kvmix_isa()).decode()) != isa:
        raise LibraryError(f"{path} is for {made_for}, not for {isa}")
    return loaded
