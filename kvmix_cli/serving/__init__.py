"""A plan in a serving engine: vLLM stores each layer at its plan's widths, `KVMIX_PLAN=plan.yaml vllm serve MODEL`.

Importing this package imports neither torch nor vLLM.
"""

from __future__ import annotations

import os

VARIABLE = "KVMIX_PLAN"
"""Environment variable with the path of the plan; without it nothing of the engine is changed."""


def register() -> None:
    """Make vLLM hold the plan that `KVMIX_PLAN` names; vLLM calls this in each of its processes.

    Raises:
        KvmixError: if the plan cannot be read, or this version of vLLM has not been tested.
    """
    if path := os.environ.get(VARIABLE):
        from .plugin import install

        install(path)
