"""Plans for other engines, as far as those can express them. One file an engine; pure, no torch.

get_target("vllm").write(plan) -> str
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from ..errors import ExportError, did_you_mean
from ..plan import Plan
from .refusal import refuse_axes

_TARGETS = {"vllm": ".vllm", "modelopt": ".modelopt", "llama.cpp": ".llama_cpp", "kvtuner": ".kvtuner"}


class Target(NamedTuple):
    """How an engine is told a plan, and in what its cache differs from the one that was measured here."""

    write: Callable[[Plan], str]
    caution: str


def targets() -> list[str]:
    """Names of all engines."""
    return list(_TARGETS)


def get_target(name: str) -> Target:
    """An engine by name. Raises ExportError for an unknown one."""
    if name not in _TARGETS:
        hint = did_you_mean(name, _TARGETS) or f"; there are {', '.join(_TARGETS)}"
        raise ExportError(f"cannot export to '{name}'{hint}")
    module = importlib.import_module(_TARGETS[name], __name__)

    def write(plan: Plan) -> str:
        refuse_axes(name, plan)
        return str(module.write(plan))

    return Target(write, module.CAUTION)
