"""Cache probes: a document goes through the real cache once for every choice of every tensor."""

from __future__ import annotations

import time

import torch
from kvmix_kernels.layout import FULL_PRECISION_BITS, Kind, PageLayout
from torch import Tensor

from ..cache.mixed import MixedCache
from ..errors import ModelError
from ..models.loading import LoadedModel
from ..plan import LayerPlan, Plan, TensorPlan
from .base import KV, CacheProbe, Measured, Numbers
from .choices import Grid, reference

_FULL = TensorPlan(bits=FULL_PRECISION_BITS)


def read_back(loaded: LoadedModel, probe: CacheProbe, ids: Tensor, grid: Grid) -> Measured:
    """Measure one sample, token ids `[1, T]`. Raises KvmixError."""
    start = time.perf_counter()
    tokens = ids[0].tolist()

    def numbers(layer: int, kind: Kind) -> Numbers:
        layouts = grid.layouts(kind, loaded.info.head_dim)
        curve = {
            choice: cost(_cache(loaded, grid, layer, kind, layout, len(tokens))) for choice, layout in layouts.items()
        }
        return Numbers(curve[reference(layouts)], curve)

    try:
        cost = probe.prepared(loaded, tokens, grid)
        layers = {layer: KV(numbers(layer, "key"), numbers(layer, "value")) for layer in loaded.info.quantizable}
    except torch.OutOfMemoryError as error:
        what = f"read {len(tokens)} tokens back through {loaded.info.id}"
        raise ModelError(f"no memory to {what}: use a smaller --seq-len") from error
    return Measured(time.perf_counter() - start, layers)


def _cache(loaded: LoadedModel, grid: Grid, layer: int, kind: Kind, layout: PageLayout, tokens: int) -> MixedCache:
    """An empty cache that quantizes only one layer's keys, or values."""
    chosen = TensorPlan(bits=layout.bits, group_size=layout.group)
    layers = {index: LayerPlan(k=_FULL, v=_FULL) for index in loaded.info.quantizable}
    layers[layer] = LayerPlan(k=chosen, v=_FULL) if kind == "key" else LayerPlan(k=_FULL, v=chosen)
    plan = Plan.build(loaded.info, layers, grid.cache)
    return MixedCache.from_plan(plan, loaded.model.config, reserve=tokens)
