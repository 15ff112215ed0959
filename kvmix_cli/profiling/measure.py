"""Measuring one sample with several probes.

All but cache probes share one forward pass, and one backward pass for each kind of labels that they look at. For a
cache probe the sample goes through the real cache once for every choice of every tensor.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import get_args

import torch
from kvmix_kernels.layout import BITS, FULL_PRECISION_BITS, KINDS, Kind, PageLayout
from torch import Tensor

from ..cache.mixed import MixedCache
from ..errors import KvmixError, ModelError, is_out_of_memory
from ..models.loading import LoadedModel
from ..models.projections import decoder_layers
from ..plan import CacheSettings, GroupSize, LayerPlan, Plan, TensorPlan
from ..plan.settings import Encode
from ..plan.tensors.moments import FRAME
from ..plan.tokens import TokenPolicy, TokenShares
from ..plan.windows import NoWindow, Window
from . import gradients
from .grid import EveryPair, Grid, reference
from .moments import MomentSums
from .observer import LayerObserver, observed
from .packed import check_differentiable
from .probe import CacheProbe, ChangeProbe, MetricProbe, Probe, WeightProbe
from .results import Labels, LayerResult, PassResults, SampleResult, TensorResult

_FULL = TensorPlan(bits=FULL_PRECISION_BITS)
EIGHTHS = 8
"""Shares that can be evicted are eighths."""
EVICTING_PAGE = 16
"""Tokens of a page where eviction is measured: small, so that shares of few tokens are whole pages."""


@dataclass(frozen=True)
class ProbeOptions:
    """Options of probes, apart from the text.

    Attributes:
        bits, group_sizes: choices of every curve; None for each probe's own.
        encode: encoder that curves are measured with.
        window: recent tokens whose pairs with a query metric probes leave out; `NoWindow` counts all pairs, as in an
            engine. None for each probe's own.
        frame: positions that share one origin of the rotation of keys, for metric probes; whole pages.
        evict: shares of a layer's tokens whose eviction is measured, for cache probes; multiples of an eighth.
        per_head: also score every KV head.
        checkpointing: recompute activations in the backward pass to save memory; None decides by size.
    """

    bits: tuple[int, ...] | None = None
    group_sizes: tuple[GroupSize, ...] | None = None
    encode: Encode | None = None
    window: Window | None = None
    evict: tuple[float, ...] = ()
    per_head: bool = False
    checkpointing: bool | None = None
    frame: int = FRAME

    def grid(self, probe: Probe) -> Grid | None:
        """Return the choices of a probe's curve and its cache; None for a probe that looks at neither."""
        if isinstance(probe, MetricProbe):
            return probe.grid if self.window is None else _metric_grid(self.window)
        if not isinstance(probe, ChangeProbe | CacheProbe):
            return None
        own = probe.grid
        cache = own.cache if self.encode is None else own.cache.model_copy(update={"encode": self.encode})
        return replace(own, bits=self.bits or own.bits, group_sizes=self.group_sizes or own.group_sizes, cache=cache)

    def shares(self, probe: Probe) -> tuple[float, ...]:
        """Return the shares whose eviction a probe measures; none for a probe that does not read a cache."""
        return self.evict if isinstance(probe, CacheProbe) else ()

    def scores_heads(self, probe: Probe) -> bool:
        """Return whether a probe scores every KV head; one that reads a cache scores whole layers only."""
        return self.per_head and not isinstance(probe, CacheProbe)

    def check(self, probes: Sequence[Probe]) -> None:
        """Raise KvmixError for an option that these probes have no use for."""
        names = ", ".join(probe.name for probe in probes)
        if wrong := sorted(set(self.bits or ()) - set(BITS)):
            raise KvmixError(f"{wrong[0]} bits is no width of a cache; choose from {', '.join(map(str, BITS))}")
        looks_at_widths = any(isinstance(probe, ChangeProbe | CacheProbe) for probe in probes)
        if (self.bits or self.group_sizes or self.encode) and not looks_at_widths:
            raise KvmixError(f"score {names} does not look at widths; leave out --bits, --group-size and --encode")
        if self.window is not None and not any(isinstance(probe, MetricProbe) for probe in probes):
            raise KvmixError(f"score {names} has no metric of pairs; use --score fisher-metric, or leave out --window")
        if self.frame != FRAME and not any(isinstance(probe, MetricProbe) for probe in probes):
            raise KvmixError(f"score {names} has no frames; use --score fisher-metric, or leave out --frame")
        page = CacheSettings().page
        if self.frame < page or self.frame % page:
            raise KvmixError(
                f"a frame is whole pages of {page} tokens, not {self.frame}; use --frame 256, 512 or {FRAME}"
            )
        if self.evict and not all(isinstance(probe, CacheProbe) for probe in probes):
            raise KvmixError(f"score {names} does not measure eviction; use --score kl, or leave out --evict")
        if wrong_shares := [share for share in self.evict if not 0 < share < 1 or share * EIGHTHS % 1]:
            raise KvmixError(f"cannot measure a share of {wrong_shares[0]:g} evicted; use eighths between 0 and 1")
        if self.checkpointing is not None and not any(getattr(probe, "labels", None) for probe in probes):
            raise KvmixError(f"score {names} has no backward pass; leave out --checkpointing")
        if self.per_head and (whole := [probe.name for probe in probes if isinstance(probe, CacheProbe)]):
            raise KvmixError(f"score {', '.join(whole)} has no scores per head; leave out --granularity head")


def _metric_grid(window: Window) -> Grid:
    """Return the cache of metric probes with a window of the user's."""
    if isinstance(window, NoWindow):
        return EveryPair(bits=(), group_sizes=())
    return replace(MetricProbe.grid, cache=CacheSettings(window=window))


def measure_sample(
    loaded: LoadedModel,
    probes: Sequence[Probe],
    tokens: Sequence[int],
    options: ProbeOptions,
    sums: MomentSums | None = None,
) -> dict[str, SampleResult]:
    """Measure one sample with all probes; the result is in their order.

    Args:
        sums: empty; the sample's moments are added, if a probe looks at them.

    Raises:
        ProjectionError, ModelError, QuantizationError: if the model cannot be measured so.
    """
    ids = torch.tensor([tokens], device=loaded.device)
    sharing = [probe for probe in probes if isinstance(probe, WeightProbe | ChangeProbe | MetricProbe)]
    found: dict[str, SampleResult] = {}
    if sharing:
        grids = [options.grid(probe) for probe in sharing if isinstance(probe, ChangeProbe)]
        grid = next(filter(None, grids), ChangeProbe.grid)
        found = shared_pass(
            loaded,
            sharing,
            ids,
            grid,
            metric_grid=None if options.window is None else _metric_grid(options.window),
            per_head=options.per_head,
            checkpointing=options.checkpointing,
            sums=sums,
        )
    for probe in probes:
        if isinstance(probe, CacheProbe):
            found[probe.name] = read_back(loaded, probe, ids, options.grid(probe) or probe.grid, options.evict)
    return {probe.name: found[probe.name] for probe in probes}


def shared_pass(
    loaded: LoadedModel,
    probes: Sequence[WeightProbe | ChangeProbe | MetricProbe],
    ids: Tensor,
    grid: Grid = ChangeProbe.grid,
    *,
    metric_grid: Grid | None = None,
    per_head: bool = False,
    checkpointing: bool | None = None,
    sums: MomentSums | None = None,
) -> dict[str, SampleResult]:
    """Measure one sample with all these probes at once; afterwards the model is as it was.

    Args:
        ids: token ids `[1, T]`, never padded.
        grid: choices of curves.
        metric_grid: cache of metric probes; None for that of `grid`.
        per_head: also score every KV head.
        checkpointing: recompute activations layer by layer instead of keeping them; None decides by size.
        sums: empty; the sample's moments are added, if a probe looks at them. None for keys that are not turned.

    Raises:
        ProjectionError, ModelError, QuantizationError: if the model cannot be measured so.
    """
    start = time.perf_counter()
    model, info, results = loaded.model, loaded.info, PassResults()
    labels = [each for each in get_args(Labels) if any(probe.labels == each for probe in probes)]
    if labels:
        check_differentiable(loaded)
    of_layers = [probe for probe in probes if isinstance(probe, ChangeProbe | MetricProbe)]
    of_weights = [probe for probe in probes if isinstance(probe, WeightProbe)]
    sums = MomentSums(dict.fromkeys(info.quantizable)) if sums is None else sums
    shared_labels = labels[-1] if labels else None
    grids = grid, metric_grid or grid
    layers = LayerObserver(info, of_layers, results, grids, shared_labels, per_head=per_head, sums=sums)
    projections = gradients.WeightObserver(loaded, of_weights, results, per_head=per_head)
    with ExitStack() as stack:
        stack.enter_context(gradients.differentiable(model, projections.weights))
        stack.enter_context(projections.watched())
        if of_layers:
            stack.enter_context(observed(loaded, info.quantizable, layers.observe))
        if gradients.is_large(model) if checkpointing is None else checkpointing:
            stack.enter_context(gradients.checkpointed(decoder_layers(model, info)))
        _run(loaded, ids, labels, results)
    shared = time.perf_counter() - start - sum(results.seconds.values())
    return {
        probe.name: SampleResult(shared + results.seconds[probe.name], _layers(loaded, probe, results, per_head))
        for probe in probes
    }


def _run(loaded: LoadedModel, ids: Tensor, labels: Sequence[Labels], results: PassResults) -> None:
    """Run the forward pass and its backward passes."""
    model = loaded.model
    results.scale = gradients.loss_scale(model)
    try:
        with torch.set_grad_enabled(bool(labels)):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            if "model" in labels:
                _require_probabilities(logits, loaded)
            for each in labels:
                results.labels = each
                text = each == "text"
                loss = gradients.text_loss(logits, ids[0, 1:]) if text else gradients.drawn_loss(logits, _seed(ids))
                (loss * results.scale).backward(retain_graph=each != labels[-1])
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ModelError(
                f"no memory for a backward pass of {ids.shape[1]} tokens through {loaded.info.id}: "
                "use a smaller --seq-len, or --device map on a machine with several GPUs"
            ) from error
        raise


def _layers(
    loaded: LoadedModel, probe: WeightProbe | ChangeProbe | MetricProbe, results: PassResults, per_head: bool
) -> dict[int, LayerResult]:
    """Return a probe's results of all layers."""
    layers = {}
    for index in loaded.info.quantizable:
        heads = loaded.info.heads(index).kv_heads if per_head else 0
        untouched = TensorResult(0.0, heads=(0.0,) * heads)  # the loss does not depend on the weight
        pair = [results.found.get((probe.name, index, kind)) for kind in KINDS]
        if None in pair and not isinstance(probe, WeightProbe):
            raise ModelError(
                f"the attention of layer {index} of {loaded.info.id} cannot be seen: use --score grad-norm"
            )
        layers[index] = LayerResult(*(result or untouched for result in pair))
        _require_finite(layers[index], f"gradients of {loaded.info.id} overflow", index, loaded)
    return layers


def read_back(
    loaded: LoadedModel, probe: CacheProbe, ids: Tensor, grid: Grid, evict: Sequence[float] = ()
) -> SampleResult:
    """Measure one sample, token ids `[1, T]`, through the real cache; also these shares evicted. Raises KvmixError."""
    start = time.perf_counter()
    tokens = ids[0].tolist()

    def result(layer: int, kind: Kind) -> TensorResult:
        layouts = grid.layouts(kind, loaded.info.heads(layer).dim(kind))
        curve = {
            choice: cost(_cache(loaded, grid, layer, kind, layout, len(tokens))) for choice, layout in layouts.items()
        }
        return TensorResult(curve[reference(layouts)], curve)

    layers: dict[int, LayerResult] = {}
    evicted: dict[int, dict[float, float]] = {}
    try:
        cost = probe.prepared(loaded, tokens, grid)
        for layer in loaded.info.quantizable:
            layers[layer] = LayerResult(result(layer, "key"), result(layer, "value"))
            if evict:
                evicted[layer] = {share: cost(_evicting(loaded, grid, layer, share, len(tokens))) for share in evict}
            _require_finite(layers[layer], f"losses of {loaded.info.id} are not finite", layer, loaded)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            what = f"read {len(tokens)} tokens back through {loaded.info.id}"
            raise ModelError(f"no memory to {what}: use a smaller --seq-len") from error
        raise
    return SampleResult(time.perf_counter() - start, layers, evicted)


def _evicting(loaded: LoadedModel, grid: Grid, layer: int, share: float, tokens: int) -> MixedCache:
    """Return an empty cache at 16 bits that evicts a share of one layer's tokens, by the attention they received."""
    policy = TokenPolicy(evict=share, flush=EIGHTHS * EVICTING_PAGE)
    cache = CacheSettings(page=EVICTING_PAGE, sink=grid.cache.sink, window=grid.cache.window, tokens=policy)
    whole = LayerPlan(k=_FULL, v=_FULL, tokens=TokenShares(evict=0.0))
    layers = {**dict.fromkeys(loaded.info.quantizable, whole), layer: LayerPlan(k=_FULL, v=_FULL)}
    return MixedCache.from_plan(Plan.build(loaded.info, layers, cache), loaded.config, reserve=tokens)


def _cache(loaded: LoadedModel, grid: Grid, layer: int, kind: Kind, layout: PageLayout, tokens: int) -> MixedCache:
    """Return an empty cache that quantizes only one layer's keys, or values."""
    chosen = TensorPlan(bits=layout.bits, group_size=layout.group)
    layers = {index: LayerPlan(k=_FULL, v=_FULL) for index in loaded.info.quantizable}
    layers[layer] = LayerPlan(k=chosen, v=_FULL) if kind == "key" else LayerPlan(k=_FULL, v=chosen)
    plan = Plan.build(loaded.info, layers, grid.cache)
    return MixedCache.from_plan(plan, loaded.config, reserve=tokens)


def _require_finite(pair: LayerResult, fault: str, index: int, loaded: LoadedModel) -> None:
    numbers = [number for each in pair for number in (each.value, *each.curve.values(), *each.heads)]
    if not all(map(math.isfinite, numbers)):
        raise ModelError(f"{fault} in {loaded.dtype}, first in layer {index}: {precision_advice(loaded)}")


def _require_probabilities(logits: Tensor, loaded: LoadedModel) -> None:
    """Raise ModelError for predictions that no token can be drawn from."""
    if not torch.isfinite(logits).all():
        raise ModelError(
            f"predictions of {loaded.info.id} are not finite in {loaded.dtype}: {precision_advice(loaded)}"
        )


def precision_advice(loaded: LoadedModel) -> str:
    """Return what to do about numbers that are not finite."""
    return "its weights may be damaged" if loaded.dtype == "float32" else "use --dtype float32 or bfloat16"


def _seed(ids: Tensor) -> int:
    """Return the seed of a sample's labels, so that a resumed run draws the same ones."""
    return zlib.crc32(ids.cpu().numpy().tobytes())
