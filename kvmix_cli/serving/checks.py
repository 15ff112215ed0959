"""Checks of an engine's configuration: it must be one under which the plan can be held."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from kvmix_kernels.blocks.base import GPU_BLOCKS, GPU_FRAME

from ..errors import KvmixError, PlanError
from ..models.geometry import model_info
from ..plan import Plan, TransformTensor
from ..plan.engine_blocks import check_blocks, left_out, losses_in_blocks, measured_loss
from ..plan.tensor_files import check_bases
from .contract import DEVICE_HOOKS, missing_hooks


def check_engine(plan: Plan, path: str, config: Any) -> None:
    """Raise KvmixError unless vLLM's configuration is one under which it can hold the plan.

    Args:
        plan: the plan.
        path: of its file.
        config: a `VllmConfig`.
    """
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if device not in DEVICE_HOOKS:
        raise KvmixError(
            f"vLLM runs on {device}, and kvmix holds plans in its engines for {' and '.join(DEVICE_HOOKS)} only: "
            "unset KVMIX_PLAN"
        )
    if missing := missing_hooks(DEVICE_HOOKS[device]):
        raise KvmixError(f"this vLLM lacks {'; '.join(missing)}, which kvmix relies on: install it anew")
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
    if device == "cuda":
        _check_kernels(plan, config.cache_config.block_size)
    if (window := left_out(plan)) is not None and measured_loss(plan) is None:
        raise PlanError(
            f"the plan's transform codes were made for a cache that keeps a window in full precision ({window}), and "
            "an engine codes every token: profile with --score fisher-metric --window none and allocate again, or "
            f"serve what `{_measuring(path)}` writes"
        )


def _check_kernels(plan: Plan, block: int) -> None:
    """Raise PlanError unless the kernels of GPUs read blocks of this plan."""
    if block not in GPU_BLOCKS:
        raise PlanError(
            f"blocks of {block} tokens have no GPU kernel; start the engine with --block-size 64, 128 or 256"
        )
    alone = [
        str(index)
        for index, layer in plan.layers.items()
        if isinstance(layer.k, TransformTensor) != isinstance(layer.v, TransformTensor)
    ]
    if alone:
        raise PlanError(
            f"layers {', '.join(alone)} have transform codes of keys or values alone, which have no GPU kernel; "
            "serve them on a CPU, or give both the same codec in the plan"
        )
    frame = None if plan.cache.transform is None else plan.cache.transform.frame
    if frame is not None and frame % max(GPU_FRAME, block):
        raise PlanError(
            f"frames of {frame} positions have no GPU kernel; profile with the default ones, multiples of "
            f"{max(GPU_FRAME, block)}, or serve them on a CPU"
        )


def untried() -> str:
    """Return one line about what nobody has run yet; empty on a CPU, whose engine is tested."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return ""
    return (
        "kvmix: plans in an engine have never run on a GPU: the kernels have been compiled and run in an interpreter, "
        "and each is tried against PyTorch before its first use; compare answers with those of the model without a plan"
    )


def difference(plan: Plan, path: str) -> str:
    """Return one line about what the engine holds otherwise than planned, with what that costs; empty if nothing.

    Args:
        plan: the plan.
        path: of its file.
    """
    losses, loss = losses_in_blocks(plan), measured_loss(plan)
    if loss is not None:
        cost = (
            f"it diverges by {loss.kl:.3g} nats a token there, and by {loss.plan_kl:.3g} in kvmix's own cache, "
            f"measured on {loss.tokens} tokens of {loss.text}"
        )
        return f"kvmix: the engine stores every token of the plan by itself: {'; '.join([*losses, cost])}"
    if not losses:
        return ""
    return (
        f"kvmix: the engine stores every token by itself: {', '.join(losses)}; `{_measuring(path)}` measures what that "
        "costs, and writes a plan that says it"
    )


def _measuring(path: str) -> str:
    """Return the command that measures what a plan loses in an engine, and writes it as the engine holds it."""
    out = f"{Path(path).stem}.engine.yaml"
    return shlex.join(["kvmix", "export", path, "--to", "vllm-plugin", "--measure", "--out", out])
