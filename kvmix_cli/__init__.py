"""kvmix: decide how many bits each layer's KV cache deserves, then run and honestly evaluate the model with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import MixedCache
    from .errors import KvmixError
    from .models import load_model
    from .plan import Plan
    from .profile import Profile

__version__ = "0.1.0"
__all__ = ["KvmixError", "MixedCache", "Plan", "Profile", "__version__", "load_model"]

_LAZY = {
    "KvmixError": "errors",
    "MixedCache": "cache",
    "Plan": "plan",
    "Profile": "profile",
    "load_model": "models",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
