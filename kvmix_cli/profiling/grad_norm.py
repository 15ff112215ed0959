"""The paper's score: how strongly the loss depends on each layer's K and V projection (arXiv 2506.08018, section 3.2).

    s_K = ||dL/dW_k||_2        s_V = ||dL/dW_v||_2

L is the mean next-token loss of one sample. One forward and one backward give every layer's norms. A gradient is
freed as soon as its norm is taken, so that the memory over the bare model is the activations and one gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models import LoadedModel
from .base import KV, Measure
from .projections import LayerProjections, Projection, decoder_layers, find_projections

CHECKPOINTED_PARAMETERS = 10**9
"""From this size on layers are run again in the backward pass by default, where memory counts for more than time. For
1024 tokens of builtin:tiny (float32, two CPU cores): 0.86 s and 140 MiB over the bare model, 0.57 s and 250 without."""
FLOAT16_LOSS_SCALE = 2.0**12
"""Lifts float16 gradients out of its subnormals. A power of two, so that the norm divides by it exactly."""


@dataclass(frozen=True)
class GradNorm:
    """L2 norm of the loss gradient with respect to W_k and W_v.

    Args:
        checkpointing: recompute activations layer by layer instead of keeping them; None decides by size.
    """

    checkpointing: bool | None = None

    @contextmanager
    def prepared(self, loaded: LoadedModel) -> Iterator[Measure]:
        """Within this block the yielded function scores token ids `[1, T]`; the model is as it was after it.

        Raises:
            ProjectionError: if the projections cannot be found.
        """
        model, info = loaded.model, loaded.info
        projections = find_projections(model, info)
        norms = _Norms(projections)
        with ExitStack() as stack:
            stack.enter_context(_differentiable(model, norms.weights))
            stack.enter_context(norms.collected())
            if _is_large(model) if self.checkpointing is None else self.checkpointing:
                stack.enter_context(_checkpointed(decoder_layers(model, info)))
            yield partial(_measure, loaded, norms)


def _measure(loaded: LoadedModel, norms: _Norms, ids: Tensor) -> dict[int, KV]:
    half = any(weight.dtype == torch.float16 for weight in norms.weights)
    scale = FLOAT16_LOSS_SCALE if half else 1.0
    norms.clear()
    try:
        with torch.enable_grad():
            loss = loaded.model(input_ids=ids, labels=ids, use_cache=False).loss  # the model shifts the labels
            (loss * scale).backward()
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"no memory for a backward pass of {ids.shape[1]} tokens through {loaded.info.id}: "
            "use a smaller --seq-len, or --device map on a machine with several GPUs"
        ) from error
    result = norms.read(scale)
    _require_finite(result, loaded)
    return result


class _Norms:
    """Takes each weight's norms when its gradient arrives, and frees the gradient."""

    def __init__(self, projections: dict[int, LayerProjections]) -> None:
        self._norms: dict[tuple[int, int], Tensor] = {}
        self._layers = list(projections)
        self._parts: dict[nn.Parameter, list[tuple[tuple[int, int], Projection]]] = defaultdict(list)
        for index, pair in projections.items():
            for kind, projection in enumerate(pair):
                self._parts[projection.weight].append(((index, kind), projection))

    @property
    def weights(self) -> list[nn.Parameter]:
        """Every parameter that needs a gradient, once."""
        return list(self._parts)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Within this block, gradients of the weights turn into norms."""
        handles = [weight.register_post_accumulate_grad_hook(self._collect) for weight in self._parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def clear(self) -> None:
        """Forget what an earlier sample has left."""
        self._norms.clear()

    def read(self, scale: float) -> dict[int, KV]:
        """The norms since `clear`, divided by the scale of the loss; 0 for a layer that the loss does not touch."""
        norms = {key: norm.item() / scale for key, norm in self._norms.items()}
        return {index: KV(norms.get((index, 0), 0.0), norms.get((index, 1), 0.0)) for index in self._layers}

    def _collect(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        for key, projection in self._parts[cast(nn.Parameter, weight)]:
            self._norms[key] = torch.linalg.vector_norm(projection.part(gradient), dtype=dtype)


@contextmanager
def _differentiable(model: PreTrainedModel, weights: Iterable[nn.Parameter]) -> Iterator[None]:
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


@contextmanager
def _checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
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


def _is_large(model: PreTrainedModel) -> bool:
    return sum(parameter.numel() for parameter in model.parameters()) >= CHECKPOINTED_PARAMETERS


def _require_finite(norms: dict[int, KV], loaded: LoadedModel) -> None:
    for index, pair in norms.items():
        if not all(norm < float("inf") for norm in pair):
            dtype = str(loaded.model.dtype).removeprefix("torch.")
            advice = "its weights may be damaged" if dtype == "float32" else "use --dtype float32 or bfloat16"
            raise ModelError(f"gradients of {loaded.info.id} overflow in {dtype}, first in layer {index}: {advice}")
