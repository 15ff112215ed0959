"""Looking at each layer's attention from within, through an attention implementation of our own.

`observed` swaps it in for a block. It computes what `kvmix` computes, and shows each layer's query, keys and values at
the moment that the gradient of the layer's output arrives. They travel through autograd's saved tensors, so they cost
no memory that attention itself does not need, and a checkpointed layer recomputes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from kvmix_kernels.segments import Segments
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..cache.attention import kvmix_attention
from ..cache.handle import Handle
from ..errors import ModelError
from ..models.loading import LoadedModel
from ..quiet import hushed
from .layer import Attend

NAME = "kvmix-observed"

Arrived = Callable[[int, Attend, Tensor, Tensor, Tensor, Tensor | None], None]
"""Called with a layer's index, its attention, query `[1, H, T, D]`, key and value `[1, H_kv, T, D]`, and in a backward
pass the gradient of its output, `[1, T, H, D]`."""


@contextmanager
def observed(loaded: LoadedModel, layers: Collection[int], arrived: Arrived) -> Iterator[None]:
    """Within this block `arrived` is told of these layers: in backward passes, or in forward passes without gradients.

    Raises:
        ModelError: if the model computes attention on its own.
    """
    model = loaded.model
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, partial(_attention, frozenset(layers), arrived))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        with hushed(), suppress(ValueError):
            model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ModelError(
                f"{type(model).__name__} computes attention on its own, where it cannot be observed: "
                "use --score grad-norm or loss"
            )
        yield
    finally:
        with hushed():
            model.set_attn_implementation(before)


def _attention(
    layers: frozenset[int],
    arrived: Arrived,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function `kvmix`, observed in some layers."""
    output, _ = kvmix_attention(module, query, key, value, mask, **options)
    index = getattr(module, "layer_idx", None)
    if index not in layers:
        return output, None
    told = partial(arrived, index, partial(_attend, module, options))
    if torch.is_grad_enabled():
        return _Observed.apply(output.requires_grad_(), query, key, value, told), None
    told(query, key, value, None)
    return output, None


def _attend(module: nn.Module, options: dict[str, Any], query: Tensor, key: Segments, value: Segments) -> Tensor:
    """Attention as this layer does it, over segments: causal, to `[1, H, S, D]`."""
    return kvmix_attention(module, query, Handle(key), Handle(value), None, **options)[0].transpose(1, 2)


class _Observed(torch.autograd.Function):
    """Passes an attention output on as it is, and in the backward pass its gradient, after telling of it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, query: Tensor, key: Tensor, value: Tensor, told: Callable[..., None]) -> Any:
        ctx.save_for_backward(query, key, value)
        ctx.told = told
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.told(*ctx.saved_tensors, gradient)
        return gradient, None, None, None, None
