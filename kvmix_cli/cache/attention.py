"""The attention function that transformers calls by the name `kvmix`."""

from __future__ import annotations

from typing import Any

from kvmix_kernels.attend import AttentionProblem, attend
from kvmix_kernels.segments import Segments
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .handle import Handle
from .observing import Attention

NAME = "kvmix"


def kvmix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over packed or plain keys and values.

    Packed ones go to `kvmix_kernels.attend`, and so do plain ones that are decoded on a CPU, where it is faster. Other
    plain ones (a prompt) go to SDPA, unless the model needs a soft-cap or sink logits, which SDPA does not have. What
    `attend` does not know (dropout, a position bias) goes to SDPA as well, which dequantizes the handles.

    Args:
        query: `[B, H, S, D]`; key, value: `[B, H_kv, T, D]`, plain or handles.
        attention_mask: as `sdpa_mask` makes it: boolean `[B, 1, S, T]`, or None for causal.

    Returns:
        `[B, S, H, D]` and None for the attention weights.

    Raises:
        PolicyError: if the cache's transforms cannot go with what this attention does.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = key.layer if isinstance(key, Handle) else None
    if layer is not None:
        layer.check(softcap, s_aux)
    if isinstance(key, Handle) and key.is_raw:
        key, value = key.segments.tail, value.segments.tail  # type: ignore[attr-defined]
    ours = isinstance(key, Handle) or (query.device.type == "cpu" and query.shape[2] < key.shape[2])
    special = softcap is not None or s_aux is not None
    foreign = dropout > 0 or kwargs.get("position_bias") is not None
    if (foreign or not ours) and not special:
        layer = layer if not foreign else None
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        output, logarithms = output.transpose(1, 2), None
    else:
        stored = layer if isinstance(key, Handle) else None
        query = query if stored is None else stored.query(query)
        output, logarithms = attend(
            AttentionProblem(query, _segments(key), _segments(value), scaling, attention_mask, softcap, s_aux)
        )
        output = output if stored is None else stored.output(output)
    if layer is not None:
        layer.observe(Attention(query, scaling, attention_mask, softcap, s_aux, logarithms))
    return output.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make `attn_implementation="kvmix"` known. Without its mask, left padding would silently be ignored."""
    AttentionInterface.register(NAME, kvmix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _segments(states: Tensor) -> Segments:
    return states.segments if isinstance(states, Handle) else Segments(None, None, states)
