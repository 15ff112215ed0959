"""Processes of vLLM's CPU engine: their environment, and how long they may take."""

import os

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
PATIENCE = 1200
"""Seconds that an engine may take to start and answer on a busy machine."""


def environment(plan=None, **more):
    """The environment of an engine that holds a plan."""
    chosen = {} if plan is None else {"KVMIX_PLAN": str(plan)}
    return {**os.environ, **ENVIRONMENT, **chosen, **more}
