"""Layers of a plan in the blocks of a serving engine, in which every token stands alone.

An engine has pages of its own, shared by sequences and written token by token, so not all of a plan can be held there.
Groups of keys run along channels instead of tokens, and no token stays in full precision: neither sink nor window nor
exact tokens.
"""

from __future__ import annotations

import torch
from kvmix_kernels.blocks import AffineBlocks, BlockLayer, BlockTensor, CodedBlocks, PlainBlocks
from kvmix_kernels.layout import FULL_PRECISION_BITS, WORD_BITS, Kind, PageLayout
from kvmix_kernels.transform import TransformBasis
from kvmix_kernels.transform_layout import TransformLayout

from ..errors import PlanError
from ..plan import Plan, TensorPlan, TransformTensor
from ..plan.sizes import exact_tokens
from ..ranks import own_heads
from .bases import basis_of

Shard = tuple[int, int]
"""Rank, and number of ranks: each has as many of the KV heads of every layer."""
ALL: Shard = (0, 1)


def block_layer(plan: Plan, index: int, block: int, dtype: torch.dtype, shard: Shard = ALL) -> BlockLayer:
    """Return a layer's storage in blocks.

    Args:
        plan: that `check_blocks` accepts.
        index: of the layer.
        block: tokens of a block.
        dtype: of the model, for what stays in full precision.
        shard: the KV heads.

    Raises:
        PlanError: if the layer, or the plan's basis, does not fit blocks.
    """
    layer = plan.layers[index]
    try:
        keys, values = (_tensor(plan, index, each, kind, block, dtype, shard) for each, kind in layer.tensors)
    except ValueError as error:
        raise PlanError(f"layer {index} cannot be held in an engine's blocks: {error}; allocate without it") from error
    return BlockLayer(keys, values)


def bytes_per_token(plan: Plan, index: int, block: int, dtype: torch.dtype, ranks: int = 1) -> int:
    """Return the bytes of one token of one KV head: those of the rank that needs most, as all ranks take as many."""
    return max(block_layer(plan, index, block, dtype, (rank, ranks)).bytes_per_token for rank in range(ranks))


def check_blocks(plan: Plan, block: int, ranks: int = 1) -> None:
    """Raise PlanError with every reason why an engine cannot hold a plan.

    Args:
        plan: the plan.
        block: tokens of a block.
        ranks: number of processes that share the KV heads of every layer.
    """
    faults = []
    if plan.cache.codecs is not None:
        faults.append("its cache has page codecs, which no kernel reads")
    elif plan.cache.axes:
        faults.append(f"its cache has {' and '.join(plan.cache.axes)}, which look at more than one token")
    if plan.model.stock:
        faults.append(f"layers {', '.join(map(str, plan.model.stock))} keep a cache of their own kind")
    for heads, layers in plan.model.geometries.items():
        if heads.key_dim != heads.value_dim:
            faults.append(f"layer {layers[0]} has keys of {heads.key_dim} channels and values of {heads.value_dim}")
        if heads.kv_heads % ranks:
            faults.append(f"layer {layers[0]} has {heads.kv_heads} KV heads, which {ranks} ranks do not divide")
        if heads.key_dim % WORD_BITS:
            faults.append(f"layer {layers[0]} has heads of {heads.key_dim} channels, no multiple of {WORD_BITS}")
    if block % WORD_BITS:
        faults.append(f"blocks of {block} tokens are no multiple of {WORD_BITS}")
    frame = None if plan.cache.transform is None else plan.cache.transform.frame
    if frame is not None and frame % block:
        faults.append(f"frames of {frame} positions are no whole blocks of {block} tokens")
    if faults:
        raise PlanError(f"an engine cannot hold the plan for {plan.model.id}: {'; '.join(faults)}")


def losses_in_blocks(plan: Plan) -> list[str]:
    """Return what of a plan's storage is another in blocks, in words; empty if nothing is."""
    found = []
    grouped = [
        i for i, each in plan.layers.items() if isinstance(each.k, TensorPlan) and each.k.bits < FULL_PRECISION_BITS
    ]
    if grouped:
        found.append(f"keys of {len(grouped)} layers in groups along channels, not tokens")
    if plan.cache.sink:
        found.append(f"no sink of {plan.cache.sink}")
    if plan.cache.window.short != "none":
        found.append(f"no window ({plan.cache.window.short})")
    if exact := max(exact_tokens(layer, plan.cache) for layer in plan.layers.values()):
        found.append(f"no exact tokens ({exact} a page)")
    return found


def _tensor(
    plan: Plan,
    index: int,
    tensor: TensorPlan | TransformTensor,
    kind: Kind,
    block: int,
    dtype: torch.dtype,
    shard: Shard,
) -> BlockTensor:
    heads = plan.model.heads(index)
    own = own_heads(heads.kv_heads, *shard)
    count = own.stop - own.start
    if isinstance(tensor, TransformTensor):
        return CodedBlocks(_basis(plan, index, TransformLayout(kind, tensor.runs, heads.dim(kind), block), dtype, own))
    if tensor.bits == FULL_PRECISION_BITS:
        return PlainBlocks(kind, count, heads.dim(kind), block, dtype)
    size = plan.cache.group_size if tensor.group_size is None else tensor.group_size
    group = None if size == "row" else size
    layout = PageLayout("value", tensor.bits, heads.dim(kind), block, group, plan.cache.scale_dtype)
    return AffineBlocks(kind, count, layout, tensor.encode or plan.cache.encoder(kind))


def _basis(plan: Plan, index: int, layout: TransformLayout, dtype: torch.dtype, own: slice) -> TransformBasis:
    """Return the directions of some of a layer's KV heads."""
    if plan.cache.transform is None:
        raise AssertionError("a plan with transform codes names their basis")
    whole = basis_of(plan.cache.transform, index, layout, torch.device("cpu"), dtype)
    part = TransformLayout(layout.kind, layout.widths[own], layout.head_dim, layout.page)
    tensors = (each[own].contiguous() for each in (whole.encoder, whole.decoder, whole.mean, whole.deviation))
    encoder, decoder, mean, deviation = tensors
    return TransformBasis(part, encoder, decoder, mean, deviation, whole.frames)
