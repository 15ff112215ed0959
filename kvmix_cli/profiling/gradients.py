"""Backward passes through a model that stays as it was, and the gradients of its K and V projections.

Weight probes see each gradient as it arrives; it is freed before the next one does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from kvmix_kernels.layout import Kind
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..models.loading import LoadedModel
from ..models.parts import whole
from ..models.projections import Projection, find_projections
from .packed import watch_outputs
from .probe import WeightProbe
from .results import PassResults, TensorResult

CHECKPOINTED_PARAMETERS = 10**9
"""From this size on layers are run again in the backward pass by default, where memory counts for more than time. For
1024 tokens of builtin:tiny (float32, two CPU cores): 0.86 s and 140 MiB over the bare model, 0.57 s and 250 without."""
FLOAT16_LOSS_SCALE = 2.0**12
"""Lifts float16 gradients out of its subnormals. A power of two, so that numbers are divided by it exactly."""


class WeightObserver:
    """The projections of a model, whose gradients are shown to weight probes.

    Raises:
        ProjectionError: if the projections cannot be found.
    """

    def __init__(
        self, loaded: LoadedModel, probes: Sequence[WeightProbe], results: PassResults, *, per_head: bool
    ) -> None:
        self._probes, self._results, self._per_head = probes, results, per_head
        self._info = loaded.info
        self._parts: dict[nn.Module, list[tuple[int, Kind, Projection]]] = defaultdict(list)
        for layer, pair in (find_projections(loaded.model, loaded.info) if probes else {}).items():
            self._parts[pair.k.module].append((layer, "key", pair.k))
            self._parts[pair.v.module].append((layer, "value", pair.v))

    @property
    def weights(self) -> list[nn.Parameter]:
        """Return every parameter that needs a gradient, once; a packed weight can have none."""
        found = [parts[0][2].weight for parts in self._parts.values()]
        return [weight for weight in found if weight is not None]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this block turn gradients into results as they arrive."""
        handles: list[RemovableHandle] = []
        try:
            for module, parts in self._parts.items():
                measure = partial(self._measure, module)
                weight = parts[0][2].weight
                if weight is None:
                    handles.append(watch_outputs(module, measure))
                else:
                    register: Callable[..., RemovableHandle] = weight.register_post_accumulate_grad_hook
                    handles.append(register(partial(_take, measure)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _measure(self, module: nn.Module, gradient: Tensor) -> None:
        for layer, kind, projection in self._parts[module]:
            for probe in self._probes:
                if probe.labels == self._results.labels:
                    with self._results.timed(probe.name):
                        head_dim = self._info.heads(layer).dim(kind) if self._per_head else None
                        self._results.found[probe.name, layer, kind] = self._result(
                            probe, projection, gradient, head_dim
                        )

    def _result(
        self, probe: WeightProbe, projection: Projection, gradient: Tensor, head_dim: int | None
    ) -> TensorResult:
        scale = self._results.scale
        heads = () if head_dim is None else projection.heads(gradient, head_dim)
        value = probe.score(projection.part(gradient)).item() / scale
        return TensorResult(value, heads=tuple(probe.score(head).item() / scale for head in heads))


def _take(measure: Callable[[Tensor], None], weight: Tensor) -> None:
    """Measure the gradient that a weight has got, and free it."""
    gradient, weight.grad = weight.grad, None
    if gradient is not None:
        measure(whole(gradient))


def loss_scale(model: PreTrainedModel) -> float:
    """Return the factor of the loss, by which gradients are divided again."""
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return FLOAT16_LOSS_SCALE if half else 1.0


def text_loss(logits: Tensor, following: Tensor) -> Tensor:
    """Return the mean loss of predictions `[tokens, vocabulary]` on the tokens that follow in the text.

    Not the model's own loss of labels: some classes do not shift them, cut them, or add a loss of their router.
    """
    return cross_entropy(logits.float(), following.to(logits.device))


def drawn_loss(logits: Tensor, seed: int) -> Tensor:
    """Return the mean loss of predictions `[tokens, vocabulary]` on tokens drawn from these predictions themselves."""
    logits = logits.float()
    generator = torch.Generator(logits.device).manual_seed(seed)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
    return cross_entropy(logits, drawn[:, 0])


@contextmanager
def differentiable(model: PreTrainedModel, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this block give gradients to these weights, and to nothing else."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            if parameter.requires_grad:  # quantized ones do not, and may refuse to be asked
                parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True).grad = None
        yield
    finally:
        for parameter, required, gradient in before:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            parameter.grad = gradient


def is_large(model: PreTrainedModel) -> bool:
    """Return whether memory counts for more than time."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return bool(parameters >= CHECKPOINTED_PARAMETERS)


@contextmanager
def checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within this block keep only each layer's input, and run the layer again in the backward pass.

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
