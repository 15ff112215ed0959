"""Observation of each layer's attention from within, which shows probes every choice in it, or its moments.

`observed` swaps in an attention implementation for a block. It computes what `kvmix` computes, and calls back with each
layer's query, keys and values as soon as the gradient of the layer's output is known. They travel through autograd's
saved tensors, so they cost no memory that attention itself does not need, and a checkpointed layer recomputes them.

Multi-head latent attention caches a latent and a rotary part, and expands both to the keys and values that it attends
to. It is observed as it caches: what is changed, or differentiated, is expanded by the layer itself, `expand_kv`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from kvmix_kernels.layout import Kind
from kvmix_kernels.segments import Segments
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..cache.attention import kvmix_attention
from ..cache.handle import Handle
from ..errors import ModelError
from ..models.attention import set_attention, text_attention
from ..models.loading import LoadedModel
from ..plan import ModelInfo
from .change import Attend, Change, LayerAttention, QuantizedStates
from .grid import Grid, reference
from .moments import MomentSums
from .probe import ChangeProbe, MetricProbe
from .results import Labels, PassResults, TensorResult

NAME = "kvmix-observed"

EXPAND = "expand_kv"
"""Method of a latent attention of transformers: latent and rotary part `[1, 1, T, D]` to keys and values."""

Observe = Callable[[int, Attend, Tensor, Tensor, Tensor, Tensor | None], None]
"""Called with a layer's index, its attention, query `[1, H, T, D]`, key and value `[1, H_kv, T, D]` as they are cached,
and in a backward pass the gradient of its output, `[1, T, H, D]`."""
Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class LayerObserver:
    """An observer that shows each layer's choices to change probes and its moments to metric probes.

    Args:
        grids: cache and choices of change probes, and the cache of metric probes.
        sums: where moments are added.
        shared_labels: labels of the backward pass in which probes without labels of their own look on; None if there
            is no backward pass.

    Raises:
        ModelError: if the model's heads cannot be packed.
    """

    def __init__(
        self,
        info: ModelInfo,
        probes: Sequence[ChangeProbe | MetricProbe],
        results: PassResults,
        grids: tuple[Grid, Grid],
        shared_labels: Labels | None,
        *,
        per_head: bool,
        sums: MomentSums,
    ) -> None:
        self._probes, self._results, self._shared_labels = probes, results, shared_labels
        self._grid, self._metric_grid = grids
        self._info, self._per_head, self._sums = info, per_head, sums
        if any(isinstance(probe, ChangeProbe) for probe in probes):
            self._grid.check(info)

    def observe(
        self, index: int, attend: Attend, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor | None
    ) -> None:
        """Measure a layer: query `[1, H, T, D]`, key and value `[1, H_kv, T, D]`, output gradient `[1, T, H, D]`."""
        probes = [probe for probe in self._probes if (probe.labels or self._shared_labels) == self._results.labels]
        if not probes:
            return
        dtype = torch.promote_types(query.dtype, torch.float32)
        if gradient is not None:
            summed = (query.shape[2] - 1) / self._results.scale
            gradient = gradient.transpose(1, 2).to(dtype) * summed
        self._require_cached(index, key, value)
        states: dict[Kind, Tensor] = {"key": key.to(dtype), "value": value.to(dtype)}
        layer = LayerAttention(index, query.to(dtype), states, gradient, attend, self._grid)
        changing = [probe for probe in probes if isinstance(probe, ChangeProbe)]
        for kind in layer.states if changing else ():
            self._measure(layer, kind, changing)
        metrics = [probe for probe in probes if isinstance(probe, MetricProbe)]
        if metrics:
            self._measure_moments(layer, metrics)

    def _require_cached(self, index: int, key: Tensor, value: Tensor) -> None:
        """Raise ModelError if attention reads other keys and values than the cache holds."""
        heads = self._info.heads(index)
        if (key.shape[1], key.shape[3], value.shape[3]) != (heads.kv_heads, heads.key_dim, heads.value_dim):
            raise ModelError(
                f"layer {index} of {self._info.id} caches heads of {heads} and attends to others, "
                "which cannot be observed: use --score grad-norm, loss or kl"
            )

    def _measure(self, layer: LayerAttention, kind: Kind, probes: Sequence[ChangeProbe]) -> None:
        """Measure all choices of keys, or values; each is computed once for all probes, and then freed."""
        states = layer.states[kind]
        layouts = self._grid.layouts(kind, states.shape[3])
        important = reference(layouts)
        curves: dict[str, dict[str, float]] = {probe.name: {} for probe in probes}
        heads: dict[str, tuple[float, ...]] = {}
        for choice, layout in layouts.items():
            change = Change(QuantizedStates(layer, kind, layout))
            for probe in probes:
                with self._results.timed(probe.name):
                    curves[probe.name][choice] = probe.cost(change).item()
                    if choice == important:
                        each = range(states.shape[1] if self._per_head else 0)
                        heads[probe.name] = tuple(probe.cost(change.head(head)).item() for head in each)
        for name, curve in curves.items():
            self._results.found[name, layer.index, kind] = TensorResult(curve[important], curve, heads[name])

    def _measure_moments(self, layer: LayerAttention, probes: Sequence[MetricProbe]) -> None:
        with self._results.timed(probes[0].name):
            self._sums.add(layer if self._metric_grid == self._grid else replace(layer, grid=self._metric_grid))
        moments = self._sums.layer(layer.index)
        for probe in probes:
            with self._results.timed(probe.name):
                for kind, each in zip(layer.states, (moments.k, moments.v), strict=True):
                    heads = probe.score(each)
                    result = TensorResult(sum(heads), heads=tuple(heads) if self._per_head else ())
                    self._results.found[probe.name, layer.index, kind] = result


@contextmanager
def observed(loaded: LoadedModel, layers: Collection[int], observe: Observe) -> Iterator[None]:
    """Within this block call `observe` for these layers: in backward passes, or in forward passes without gradients.

    Afterwards the model has its own attention again, and the observer is registered nowhere.

    Raises:
        ModelError: if the model computes attention on its own.
    """
    model = loaded.model
    before = text_attention(model)
    try:
        with _latents(model) as latents:
            AttentionInterface.register(NAME, partial(_attention, frozenset(layers), observe, latents))
            AttentionMaskInterface.register(NAME, sdpa_mask)
            if not set_attention(model, NAME):
                raise ModelError(
                    f"{type(model).__name__} computes attention on its own, where it cannot be observed: "
                    "use --score grad-norm or loss"
                )
            yield
    finally:
        set_attention(model, before)
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(NAME, None)  # transformers has no opposite of `register`


@contextmanager
def _latents(model: nn.Module) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Within this block keep the latent and the rotary part that each latent attention has last expanded."""
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keeping(module: nn.Module, expand: Expand) -> Expand:
        def keep(latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
            found[module] = latent, rotary
            return expand(latent, rotary)

        return keep

    expanding = [module for module in model.modules() if hasattr(module, EXPAND)]
    try:
        for module in expanding:
            vars(module)[EXPAND] = keeping(module, getattr(module, EXPAND))
        yield found
    finally:
        for module in expanding:
            vars(module).pop(EXPAND, None)


def _attention(
    layers: frozenset[int],
    observe: Observe,
    latents: dict[nn.Module, tuple[Tensor, Tensor]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    /,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as `kvmix` does, observed in some layers.

    The first parameters are positional only, so that options of a model may have any name.

    Raises:
        ModelError: if an observed layer adds a bias of its own to its scores, or chooses the tokens that it reads,
            which `_attend` does not know.
    """
    output, _ = kvmix_attention(module, query, key, value, attention_mask, **options)
    index = getattr(module, "layer_idx", None)
    if index not in layers:
        return output, None
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ModelError(
            f"layer {index} adds a bias of its own to its attention scores ({type(module).__name__}), "
            "which cannot be observed: use --score grad-norm, loss or kl"
        )
    if options.get("indices") is not None:
        raise ModelError(
            f"layer {index} chooses the tokens that it reads ({type(module).__name__}), "
            "which cannot be observed: use --score grad-norm, loss or kl"
        )
    expand: Expand | None = None
    if module in latents:
        key, value = latents.pop(module)
        expand = getattr(type(module), EXPAND).__get__(module)
    report = partial(observe, index, partial(_attend, module, options, expand))
    if torch.is_grad_enabled():
        pass_on: Callable[..., Tensor] = _Observed.apply
        return pass_on(output.requires_grad_(), query, key, value, report), None
    report(query, key, value, None)
    return output, None


def _attend(
    module: nn.Module, options: dict[str, Any], expand: Expand | None, query: Tensor, key: Segments, value: Segments
) -> Tensor:
    """Attend as this layer does, over segments: causal, to `[1, H, S, D]`."""
    if expand is not None:
        dtype = next(module.parameters()).dtype
        expanded = expand(key.dequantize().to(dtype), value.dequantize().to(dtype))
        key, value = (Segments(None, None, states.to(query.dtype)) for states in expanded)
    return kvmix_attention(module, query, Handle(key), Handle(value), None, **options)[0].transpose(1, 2)


class _Observed(torch.autograd.Function):
    """The identity of an attention output, whose backward pass reports the gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, query: Tensor, key: Tensor, value: Tensor, report: Callable[..., None]
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.report = report
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.report(*ctx.saved_tensors, gradient)
        return gradient, None, None, None, None
