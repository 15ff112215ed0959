"""Showing the gradients of the K and V projections to weight probes, one at a time, and freeing each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from kvmix_kernels.layout import Kind
from torch import Tensor, nn

from ..models.loading import LoadedModel
from ..models.projections import Projection, find_projections
from .base import Numbers, WeightProbe
from .tally import Tally


class Weights:
    """The projections of a model, watched by weight probes.

    Raises:
        ProjectionError: if the projections cannot be found.
    """

    def __init__(self, loaded: LoadedModel, probes: Sequence[WeightProbe], tally: Tally, *, per_head: bool) -> None:
        self._probes, self._tally, self._per_head = probes, tally, per_head
        self._head_dim = loaded.info.head_dim
        self._parts: dict[nn.Parameter, list[tuple[int, Kind, Projection]]] = defaultdict(list)
        for layer, pair in (find_projections(loaded.model, loaded.info) if probes else {}).items():
            self._parts[pair.k.weight].append((layer, "key", pair.k))
            self._parts[pair.v.weight].append((layer, "value", pair.v))

    def __iter__(self) -> Iterator[nn.Parameter]:
        """Every parameter that needs a gradient, once."""
        return iter(self._parts)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this block gradients turn into numbers as they arrive."""
        handles = [weight.register_post_accumulate_grad_hook(self._see) for weight in self._parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        for layer, kind, projection in self._parts[cast(nn.Parameter, weight)]:
            for probe in self._probes:
                if probe.labels == self._tally.labels:
                    with self._tally.timed(probe):
                        self._tally.note(probe, layer, kind, self._numbers(probe, projection, gradient))

    def _numbers(self, probe: WeightProbe, projection: Projection, gradient: Tensor) -> Numbers:
        scale = self._tally.scale
        heads = projection.heads(gradient, self._head_dim) if self._per_head else []
        value = probe.score(projection.part(gradient)).item() / scale
        return Numbers(value, heads=tuple(probe.score(head).item() / scale for head in heads))
