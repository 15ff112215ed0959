"""Backward passes through a model that stays as it was: which weights have gradients, and what is recomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

CHECKPOINTED_PARAMETERS = 10**9
"""From this size on layers are run again in the backward pass by default, where memory counts for more than time. For
1024 tokens of builtin:tiny (float32, two CPU cores): 0.86 s and 140 MiB over the bare model, 0.57 s and 250 without."""
FLOAT16_LOSS_SCALE = 2.0**12
"""Lifts float16 gradients out of its subnormals. A power of two, so that numbers are divided by it exactly."""


def loss_scale(model: PreTrainedModel) -> float:
    """What to multiply the loss with, and to divide gradients by."""
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return FLOAT16_LOSS_SCALE if half else 1.0


def drawn_loss(logits: Tensor, seed: int) -> Tensor:
    """Mean loss of predictions `[tokens, vocabulary]` on tokens drawn from these predictions themselves."""
    logits = logits.float()
    generator = torch.Generator(logits.device).manual_seed(seed)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
    return cross_entropy(logits, drawn[:, 0])


@contextmanager
def differentiable(model: PreTrainedModel, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this block these weights, and nothing else, have gradients."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True).grad = None
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required).grad = gradient


def is_large(model: PreTrainedModel) -> bool:
    """Whether memory counts for more than time."""
    return sum(parameter.numel() for parameter in model.parameters()) >= CHECKPOINTED_PARAMETERS


@contextmanager
def checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within this block each layer keeps its input only, and is run again in the backward pass.

    transformers' own switch works in training mode only, which would turn dropout on.
    """
    before = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer, _ in before:
            layer.forward = _recomputed(layer.forward)
        yield
    finally:
        for layer, forward in before:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
