"""The attention function that transformers calls by the name `kvmix`."""

from __future__ import annotations

from typing import Any

import torch
from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.segments import Segments
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import PolicyError
from .grouped import GroupedHandle
from .handle import Handle, TransformingLayer
from .observation import AttentionCall

NAME = "kvmix"


def kvmix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to packed or plain keys and values; the first arguments are those of transformers' SDPA, in its order.

    Packed ones go to `kvmix_kernels.attend`, and so do plain ones that are decoded on a CPU, where it is faster. Other
    plain ones (a prompt) go to SDPA, unless the model needs a soft-cap or sink logits, which SDPA does not have. What
    `attend` does not have (dropout, a position bias, more queries than keys) goes to SDPA as well, which dequantizes
    the handles.

    Args:
        module: the attention module; its `is_causal` counts where the argument is None.
        query: `[B, H, S, D]`.
        key: `[B, H_kv, T, D]`, plain or a handle.
        value: `[B, H_kv, T, D_v]`, plain or a handle.
        attention_mask: boolean `[B, 1, S, T]` as `sdpa_mask` makes it, or None for causal (or all, see `module`).
        indices: tokens `[B, S, n]` that an indexer chose (DeepSeek's sparse attention); the others are not read.

    Returns:
        The output `[B, S, H, D_v]`, and None for the attention weights.

    Raises:
        PolicyError: if the cache's transforms, or a head-wise press of kvpress, cannot be combined with this attention,
            or a model chooses blocks of keys for each head.
    """
    if isinstance(key, GroupedHandle) and isinstance(value, GroupedHandle):
        whole = (dropout, scaling, is_causal, softcap, indices)
        return _by_groups(module, query, key, value, attention_mask, position_bias, s_aux, whole, kwargs), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = _mask_of(module, query, key, attention_mask, is_causal, indices, kwargs.get("block_indices"))
    layer = _checked_layer(module, key, softcap, s_aux) if isinstance(key, Handle) else None
    if isinstance(key, Handle) and key.is_raw and isinstance(value, Handle):
        key, value = key.segments.tail, value.segments.tail
    logarithms: Tensor | None = None
    unsupported = dropout > 0 or position_bias is not None or query.shape[2] > key.shape[2]
    has_kernel = isinstance(key, Handle) or (query.device.type == "cpu" and query.shape[2] < key.shape[2])
    if (has_kernel and not unsupported) or softcap is not None or s_aux is not None:
        stored = layer if isinstance(key, Handle) else None
        query = query if stored is None else stored.query(query)
        problem = AttentionProblem(query, _segments(key), _segments(value), scaling, mask, softcap, s_aux)
        output, logarithms = _by_kernel(problem, stored)
    else:
        layer = None if unsupported else layer
        more = kwargs if position_bias is None else {**kwargs, "position_bias": position_bias}
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **more}
        output = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    if layer is not None:
        layer.observe(AttentionCall(query, scaling, mask, softcap, s_aux, logarithms))
    return output, None


def _by_kernel(problem: AttentionProblem, layer: TransformingLayer | None) -> tuple[Tensor, Tensor]:
    """Return the output `[B, S, H, D_v]`, which the layer transforms back, and the logarithms of `attend`."""
    output, logarithms = attend(problem)
    return (output if layer is None else layer.output(output)).transpose(1, 2).contiguous(), logarithms


def _by_groups(
    module: nn.Module,
    query: Tensor,
    key: GroupedHandle,
    value: GroupedHandle,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    whole: tuple[float, float | None, bool | None, float | None, Tensor | None],
    more: dict[str, Any],
) -> Tensor:
    """Return the output `[B, S, H, D_v]` of attention to each group of KV heads by its own query heads."""
    dropout, scaling, is_causal, softcap, indices = whole
    ratio, outputs = query.shape[1] // key.shape[1], []
    for heads, keys, values in zip(key.heads, key.parts, value.parts, strict=True):
        chosen = (heads[:, None] * ratio + torch.arange(ratio)).flatten().to(query.device)
        own = [each if each is None or each.shape[1] == 1 else each[:, chosen] for each in (mask, bias)]
        logits = None if sinks is None else sinks[chosen]
        given = (query[:, chosen], keys, values, own[0], dropout, scaling, is_causal, own[1], softcap, logits, indices)
        outputs.append(kvmix_attention(module, *given, **more)[0])
    order = torch.cat(key.heads).argsort().to(query.device)
    of_heads = torch.cat([output.unflatten(2, (-1, ratio)) for output in outputs], dim=2)
    return of_heads.index_select(2, order).flatten(2, 3)


def register_attention() -> None:
    """Make `attn_implementation="kvmix"` known. Without its mask, left padding would silently be ignored."""
    AttentionInterface.register(NAME, kvmix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _segments(states: Tensor) -> Segments:
    return states.segments if isinstance(states, Handle) else Segments(None, None, states)


def _mask_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    is_causal: bool | None,
    indices: Tensor | None,
    blocks: Tensor | None,
) -> Tensor | None:
    """Return the mask of attention that may not be causal, and whose tokens an indexer may have chosen.

    Raises:
        PolicyError: if it has chosen blocks of keys for each head.
    """
    if blocks is not None:
        raise PolicyError("blocks of keys that are chosen for each head (MiniMax-M3) need the model's own attention")
    mask = _bidirectional(module, query, key, is_causal) if mask is None else mask
    return mask if indices is None else _chosen(indices, mask, key.shape[2])


def _bidirectional(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Tensor | None:
    """Return a mask `[1, 1, S, T]` that hides nothing for attention that is not causal; None for causal attention."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal or query.shape[2] == 1:
        return None
    return torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)


def _chosen(indices: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    """Return the mask `[B, 1, S, T]` of the tokens `[B, S, n]` that an indexer chose and the given mask allows.

    A model that applies it itself does so for the names `eager` and `sdpa` only.
    """
    batch, queries, _ = indices.shape
    chosen = torch.zeros(batch, queries, tokens, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask is None:
        return chosen & chosen.new_ones(queries, tokens).tril(tokens - queries)
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _checked_layer(
    module: nn.Module, key: Handle, softcap: float | None, s_aux: Tensor | None
) -> TransformingLayer | None:
    """Return the layer of a handle, if attention has more to do for it than to read it.

    Raises:
        PolicyError: if it cannot be read by this attention, or a head-wise press has masked keys, which it would do by
            writing to them.
    """
    if getattr(module, "masked_key_indices", None) is not None:
        raise PolicyError(
            f"layer {getattr(module, 'layer_idx', '?')}: a head-wise press of kvpress masks single keys of a cache, "
            "which a kvmix cache does not let it write; use a press that drops whole tokens, or an unquantized cache"
        )
    if key.layer is not None:
        key.layer.check(softcap, s_aux)
    return key.layer
