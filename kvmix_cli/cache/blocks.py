"""Layers of a plan in the blocks of a serving engine, in which every token stands alone.

An engine has pages of its own, shared by sequences and written token by token, so not all of a plan can be held there:
see `plan/engine_blocks.py`.
"""

from __future__ import annotations

import torch
from kvmix_kernels.blocks import AffineBlocks, BlockLayer, BlockTensor, CodedBlocks, PlainBlocks
from kvmix_kernels.layout import Kind
from kvmix_kernels.transform import TransformBasis
from kvmix_kernels.transform_layout import TransformLayout

from ..errors import PlanError
from ..plan import Plan, TensorPlan, TransformTensor
from ..plan.engine_blocks import block_layout, held_sink
from ..ranks import own_heads
from .bases import basis_of

Shard = tuple[int, int]
"""Rank, and number of ranks: each has as many of the KV heads of every layer."""
ALL: Shard = (0, 1)
CPU = torch.device("cpu")


def block_layer(
    plan: Plan, index: int, block: int, dtype: torch.dtype, shard: Shard = ALL, device: torch.device = CPU
) -> BlockLayer:
    """Return a layer's storage in blocks.

    Args:
        plan: that `check_blocks` accepts.
        index: of the layer.
        block: tokens of a block.
        dtype: of the model, for what stays in full precision.
        shard: the KV heads.
        device: of the blocks.

    Raises:
        PlanError: if the layer, or the plan's basis, does not fit blocks.
    """
    layer = plan.layers[index]
    try:
        keys, values = (_tensor(plan, index, each, kind, block, dtype, shard, device) for each, kind in layer.tensors)
    except ValueError as error:
        raise PlanError(f"layer {index} cannot be held in an engine's blocks: {error}; allocate without it") from error
    return BlockLayer(keys, values)


def bytes_per_token(plan: Plan, index: int, block: int, dtype: torch.dtype, ranks: int = 1) -> int:
    """Return the bytes of one token of one KV head: those of the rank that needs most, as all ranks take as many."""
    return max(block_layer(plan, index, block, dtype, (rank, ranks)).bytes_per_token for rank in range(ranks))


def _tensor(
    plan: Plan,
    index: int,
    tensor: TensorPlan | TransformTensor,
    kind: Kind,
    block: int,
    dtype: torch.dtype,
    shard: Shard,
    device: torch.device,
) -> BlockTensor:
    heads = plan.model.heads(index)
    own = own_heads(heads.kv_heads, *shard)
    count = own.stop - own.start
    if isinstance(tensor, TransformTensor):
        basis = _basis(plan, index, TransformLayout(kind, tensor.runs, heads.dim(kind), block), dtype, own, device)
        return CodedBlocks(basis, held_sink(plan), dtype)
    layout = block_layout(tensor, plan.cache, heads.dim(kind), block)
    if layout is None:
        return PlainBlocks(kind, count, heads.dim(kind), block, dtype)
    return AffineBlocks(kind, count, layout, tensor.encode or plan.cache.encoder(kind))


def _basis(
    plan: Plan, index: int, layout: TransformLayout, dtype: torch.dtype, own: slice, device: torch.device
) -> TransformBasis:
    """Return the directions of some of a layer's KV heads."""
    if plan.cache.transform is None:
        raise AssertionError("a plan with transform codes names their basis")
    whole = basis_of(plan.cache.transform, index, layout, device, dtype)
    part = TransformLayout(layout.kind, layout.widths[own], layout.head_dim, layout.page)
    tensors = (each[own].contiguous() for each in (whole.encoder, whole.decoder, whole.mean, whole.deviation))
    encoder, decoder, mean, deviation = tensors
    return TransformBasis(part, encoder, decoder, mean, deviation, whole.frames)
