"""Tensor parallelism: a model in parts, one a rank, by the plan that transformers has for its class.

A part has the whole layers, with as many of the heads of each as there are ranks to share them. Its keys and values are
`[B, H_kv / ranks, T, D]`, and pages of one head do not depend on those of another, so that a plan of pages is held by
all ranks together exactly as by one process.
"""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import ModelError, PlanError
from ..plan import ModelInfo, Plan
from ..ranks import Ranks


def check_shares(info: ModelInfo, ranks: Ranks) -> None:
    """Raise ModelError unless the ranks can share the heads of every layer."""
    if ranks.world == 1:
        raise ModelError(
            "--tensor-parallel needs several ranks: start it with `torchrun --nproc-per-node 2 -m kvmix_cli ...`"
        )
    for heads in info.geometries:
        if heads.kv_heads % ranks.world:
            raise ModelError(
                f"{ranks.world} ranks cannot share the {heads.kv_heads} KV heads of {info.id}: start as many as divide "
                "them, or leave out --tensor-parallel, and every rank gets a whole model"
            )


def check_plan(plan: Plan) -> None:
    """Raise PlanError for a plan whose layers look at all of their heads."""
    cache = plan.cache
    if cache.transform is not None or cache.axes:
        raise PlanError(
            "the plan has transform codes, transforms or policies, which look at all heads of a layer, and every rank "
            "has a part of them: leave out --tensor-parallel, or use a plan of plain pages"
        )


def split_by(ranks: Ranks) -> dict[str, Any]:
    """Return the options of `from_pretrained` that load this rank's part."""
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=ranks.world)}


def largest(numbers: Tensor, ranks: Ranks) -> Tensor:
    """Return the largest of each number over the parts of a model; the numbers as they are if there is one part."""
    if ranks.is_sharded:
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return numbers


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which every rank has a part as a whole, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
