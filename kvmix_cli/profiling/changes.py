"""Showing each layer's choices to change probes, as soon as the gradient of the layer's output has arrived."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from kvmix_kernels.layout import Kind
from torch import Tensor

from ..plan import ModelInfo
from .base import ChangeProbe, Labels, Numbers
from .change import Change, Stored
from .choices import Grid, reference
from .layer import Attend, Layer
from .tally import Tally


class Changes:
    """The attention layers of a model, watched by change probes.

    Args:
        rider: labels of the backward pass in which probes that need none look on; None if there is no backward pass.

    Raises:
        ModelError: if the model's heads cannot be packed.
    """

    def __init__(
        self,
        info: ModelInfo,
        probes: Sequence[ChangeProbe],
        tally: Tally,
        grid: Grid,
        rider: Labels | None,
        *,
        per_head: bool,
    ) -> None:
        self._probes, self._tally, self._grid, self._rider = probes, tally, grid, rider
        kinds: tuple[Kind, Kind] = ("key", "value")
        self._layouts = {kind: grid.layouts(kind, info.head_dim) for kind in kinds} if probes else {}
        self._heads = range(info.kv_heads if per_head else 0)

    def see(
        self, index: int, attend: Attend, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor | None
    ) -> None:
        """Look at a layer: query `[1, H, T, D]`, key and value `[1, H_kv, T, D]`, output gradient `[1, T, H, D]`."""
        probes = [probe for probe in self._probes if (probe.labels or self._rider) == self._tally.labels]
        if not probes:
            return
        dtype = torch.promote_types(query.dtype, torch.float32)
        if gradient is not None:
            summed = (query.shape[2] - 1) / self._tally.scale
            gradient = gradient.transpose(1, 2).to(dtype) * summed
        states: dict[Kind, Tensor] = {"key": key.to(dtype), "value": value.to(dtype)}
        layer = Layer(index, query.to(dtype), states, gradient, attend, self._grid)
        for kind in self._layouts:
            self._see(layer, kind, probes)

    def _see(self, layer: Layer, kind: Kind, probes: Sequence[ChangeProbe]) -> None:
        """All choices of keys, or values; each is worked out once for all probes, and forgotten."""
        layouts = self._layouts[kind]
        important = reference(layouts)
        curves: dict[str, dict[str, float]] = {probe.name: {} for probe in probes}
        heads: dict[str, tuple[float, ...]] = {}
        for choice, layout in layouts.items():
            change = Change(Stored(layer, kind, layout))
            for probe in probes:
                with self._tally.timed(probe):
                    curves[probe.name][choice] = probe.cost(change).item()
                    if choice == important:
                        heads[probe.name] = tuple(probe.cost(change.head(head)).item() for head in self._heads)
        for probe in probes:
            curve = curves[probe.name]
            self._tally.note(probe, layer.index, kind, Numbers(curve[important], curve, heads[probe.name]))
