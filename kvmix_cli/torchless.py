"""A block without torch, in which transformers reads configurations in a second instead of six.

transformers loads torch, and what goes with it, as soon as it reads a configuration, wherever torch is installed.
Configurations do not need it: without torch, transformers offers them all the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TORCH = "torch"
NO_ADVICE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
"""Environment variable with which transformers does not complain that there is no torch."""
AFFECTED = ("transformers", "kvmix_cli.models")
"""Packages whose modules do without torch for good if it is not there when they are imported."""


class TorchNeeded(Exception):
    """Something inside the block cannot be answered without torch."""


def is_hidden() -> bool:
    """Return whether torch cannot be imported now."""
    return TORCH in sys.modules and sys.modules[TORCH] is None


@contextmanager
def without_torch() -> Iterator[bool]:
    """Hide torch within this block, and yield whether it is hidden: not if transformers or torch is loaded already.

    Modules that were imported meanwhile and have seen no torch are forgotten at the end, so that later imports make
    whole ones. What the block returns must therefore be plain data, without objects of transformers.
    """
    if TORCH in sys.modules or "transformers" in sys.modules:
        yield False
        return
    before, advice = set(sys.modules), os.environ.get(NO_ADVICE)
    sys.modules[TORCH] = None  # type: ignore[assignment]
    os.environ[NO_ADVICE] = "1"
    try:
        yield True
    finally:
        del sys.modules[TORCH]
        if advice is None:
            os.environ.pop(NO_ADVICE, None)
        else:
            os.environ[NO_ADVICE] = advice
        for name in set(sys.modules) - before:
            if name in AFFECTED or name.startswith(tuple(f"{package}." for package in AFFECTED)):
                del sys.modules[name]
