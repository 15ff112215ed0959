"""kvmix makes a long context take less memory: the KV cache at 1 to 8 bits, and what that costs, measured."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .cache.mixed import MixedCache
    from .errors import KvmixError
    from .models.loading import load_model
    from .plan import Plan
    from .profile import Profile

__all__ = ["KvmixError", "MixedCache", "Plan", "Profile", "__version__", "load_model"]

_LAZY = {
    "KvmixError": "errors",
    "MixedCache": "cache.mixed",
    "Plan": "plan",
    "Profile": "profile",
    "load_model": "models.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
