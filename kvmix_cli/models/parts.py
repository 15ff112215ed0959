"""Tensor parallelism: a model in parts, one a rank, by the plan that transformers has for its class.

A part has the whole layers, with as many of the heads of each as there are ranks to share them. Its keys and values are
`[B, H_kv / ranks, T, D]`, and neither pages nor transform codes of one head depend on those of another, so that a plan
of them is held by all ranks together exactly as by one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import ModelError, PlanError
from ..plan import LayerPlan, ModelInfo, Plan, TensorPlan, TransformTensor
from ..plan.tensor_files import open_basis
from ..ranks import Ranks, own_heads

ROWWISE = "rowwise"
"""Style, in the plans of transformers, of a linear layer that reads what the ranks have each a part of."""


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


def plan_part(plan: Plan, ranks: Ranks, folder: Path) -> Plan:
    """Return the plan of the heads that this rank has.

    Args:
        plan: of all heads.
        ranks: that share the heads of every layer.
        folder: where the directions of a rank's heads are written, if the plan has transform codes.

    Raises:
        PlanError: for a plan whose layers look at all of their heads, or whose basis cannot be used.
    """
    if plan.cache.axes:
        raise PlanError(
            f"the plan has {' and '.join(plan.cache.axes)}, which look at all heads of a layer, and every rank has a "
            "part of them: leave out --tensor-parallel, or use a plan of pages or of transform codes"
        )
    settings = plan.cache.transform
    if settings is None:
        return plan  # pages are the same for any number of heads
    _, whole_basis = open_basis(settings)
    name = f"{ranks.rank}.safetensors"
    checksum = whole_basis.part(ranks.rank, ranks.world).save(folder / name)
    own = settings.model_copy(update={"basis": name, "sha256": checksum}).inside(folder)
    layers = {index: _layer_part(layer, ranks) for index, layer in plan.layers.items()}
    cache = plan.cache.model_copy(update={"transform": own})
    return Plan.build(_model_part(plan.model, ranks), layers, cache, plan.provenance)


def _layer_part(layer: LayerPlan, ranks: Ranks) -> LayerPlan:
    def part(tensor: TensorPlan | TransformTensor) -> TensorPlan | TransformTensor:
        if not isinstance(tensor, TransformTensor):
            return tensor
        return TransformTensor(widths=tensor.widths[own_heads(len(tensor.widths), ranks.rank, ranks.world)])

    return layer.model_copy(update={"k": part(layer.k), "v": part(layer.v)})


def _model_part(model: ModelInfo, ranks: Ranks) -> ModelInfo:
    others = {
        index: heads.model_copy(update={"kv_heads": heads.kv_heads // ranks.world})
        for index, heads in model.other_heads.items()
    }
    return model.model_copy(update={"kv_heads": model.kv_heads // ranks.world, "other_heads": others})


def split_by(ranks: Ranks) -> dict[str, Any]:
    """Return the options of `from_pretrained` that load this rank's part."""
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=ranks.world)}


@contextmanager
def whole_sums() -> Iterator[None]:
    """Within this block load models whose sums are taken as one process takes them; afterwards all is as it was."""
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    from .whole_sums import WholeSums

    ALL_PARALLEL_STYLES[ROWWISE] = WholeSums()
    try:
        yield
    finally:
        del ALL_PARALLEL_STYLES[ROWWISE]


def largest(numbers: Tensor, ranks: Ranks) -> Tensor:
    """Return the largest of each number over the parts of a model; the numbers as they are if there is one part."""
    if ranks.is_sharded:
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return numbers


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which every rank has a part as a whole, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
