"""Presets at a size that is asked for: every published method with the same stored bytes.

All of them have pages of 64 tokens where their policy allows it, groups of 64 elements, four sinks and a window of 64
tokens, so that equal stored bits are equal bytes. What a preset changes to reach a size depends on what it does:

    widths only, tiers, channel runs   widths, of keys before values; tiers and runs stay wider than the rest
    a share of tokens evicted          the share, with the preset's own slope over the layers; then widths
    a number of tokens kept            the number, and the window with it

Between two widths, the first layers have the wider one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from kvmix_kernels.layout import FULL_PRECISION_BITS

from ...errors import PlanError
from ..document.fields import WIDTHS
from ..document.geometry import ModelInfo
from ..layers import LayerPlan
from ..plan import Plan
from ..settings import CacheSettings
from ..sizes import mean_bits
from ..token_scores import READ_AGAIN
from ..tokens import TokenPolicy
from .preset import Preset, Widths
from .pyramids import EvictedByDepth, KeptByDepth, Pyramid

LAYOUT: dict[str, Any] = {"page": 64, "sink": 4, "group_size": 64, "window": {"kind": "recent", "tokens": 64}}
EXACT_TOKENS = 100
"""Sinks and window of the layout, and the half of a page that waits to be packed in the mean."""
SLACK = 0.005
"""Stored bits by which a plan may exceed its size, so that rounded sizes can be met."""
EVICTION_PAGE, EVICTION_FLUSHES = 32, (128, 256, 512)
"""Pages of what evicts and quantizes, and flushes: the shortest in which every layer keeps a page."""
BUDGET_PAGE = 16
"""Pages of what evicts and does not quantize, and steps of numbers of tokens."""
LONGEST_FLUSH = 320
"""Flush of tiers up to which it is doubled for the pages of the layout."""
STEPS = range(12, -9, -1)
"""Steps by which widths are raised: keys at odd ones, values at even ones."""


def scaled(preset: Preset, name: str, model: ModelInfo, stored_bits: float, context: int) -> Plan:
    """Return the plan of a preset with the most bytes that a size has room for.

    Args:
        name: name of the preset.
        stored_bits: most stored bits; of a number of tokens to keep, see `room`.
        context: tokens of the context whose bytes a number of tokens to keep must not exceed, and of which a preset
            that chooses what it reads has to leave some unread.

    Raises:
        PlanError: if the preset cannot reach the size, does not fit the model, or would read all of the context.
    """
    if preset.bits is None:
        raise PlanError(f"preset '{name}' states no widths: a profile decides them")
    reading = preset.cache.reading
    if reading is not None and reading.tokens is not None and reading.tokens >= context:
        raise PlanError(f"preset '{name}' reads {reading.tokens} tokens a step, which is all of a context of {context}")
    tokens = preset.cache.tokens
    try:
        if tokens is None or tokens.tiers:
            layers, cache = _widened(preset, preset.bits, model, stored_bits)
        elif tokens.keep is None:
            layers, cache = _evicting(preset, preset.bits, tokens, model, stored_bits)
        else:
            layers, cache = _keeping(preset, preset.bits, tokens, model, room(model, stored_bits, context), context)
    except ValueError as error:
        raise PlanError(f"preset '{name}' has no plan of {stored_bits:g} stored bits: {error}") from error
    return Plan.build(
        model, layers, cache, {"method": "preset", "preset": name, "budget": {"stored_bits": stored_bits}}
    )


def room(model: ModelInfo, stored_bits: float, context: int) -> int:
    """Return the bytes of a context in the layout: what is not packed in 16 bits, all other tokens in `stored_bits`."""
    exact = min(context, EXACT_TOKENS)
    bits = exact * FULL_PRECISION_BITS + (context - exact) * stored_bits
    return int(bits * sum(model.heads(index).token_elements for index in model.quantizable) / 8)


def _widened(
    preset: Preset, widths: Widths, model: ModelInfo, stored_bits: float
) -> tuple[dict[int, LayerPlan], CacheSettings]:
    """Return the widest layers with a preset's tiers and runs; these are as wide as there is room for after that."""
    for step in STEPS:
        for cut in range(len(WIDTHS)):
            rung = _Rung(preset, widths, step, cut)
            layers, cache = rung.layers(model), rung.cache
            if _bits_if_any(layers, cache, model) <= stored_bits + SLACK:
                return _filled(layers, replace(rung, step=step + 1).layers(model), cache, model, stored_bits)
    raise ValueError(f"its narrowest widths take {_bits(layers, cache, model):.2f}")


@dataclass(frozen=True)
class _Rung:
    """A preset with its widths raised by `step`, and those of its tiers and runs lowered by `cut` places.

    Tiers and runs stay one width above the layers'.
    """

    preset: Preset
    widths: Widths
    step: int
    cut: int = 0

    def layers(self, model: ModelInfo) -> dict[int, LayerPlan]:
        """Return the layers of a model."""
        count = len(model.quantizable)
        return {
            layer: LayerPlan.of_bits(
                _moved(self.widths.k.at(place, count), self._keys),
                _moved(self.widths.v.at(place, count), self._values),
            )
            for place, layer in enumerate(model.quantizable)
        }

    @property
    def cache(self) -> CacheSettings:
        """Return the settings, in the layout of all presets."""
        given = self.preset.cache
        changed: dict[str, Any] = {**LAYOUT, **given.axes, "encode": given.encode}
        if given.tokens is not None:
            tiers = tuple(
                tier.model_copy(update={"k": self._above(tier.k, "k"), "v": self._above(tier.v, "v")})
                for tier in given.tokens.tiers
            )
            changed |= _sorting(given, given.tokens.model_copy(update={"tiers": tiers}))
        if given.channels is not None:
            runs = tuple(run.model_copy(update={"bits": self._above(run.bits, "k")}) for run in given.channels.runs)
            changed["channels"] = given.channels.model_copy(update={"runs": runs})
        return CacheSettings.model_validate(changed)

    @property
    def _keys(self) -> int:
        return -(-self.step // 2)

    @property
    def _values(self) -> int:
        return self.step // 2

    def _above(self, bits: int, kind: str) -> int:
        """Return the width of a tier or run that has `bits` in the preset."""
        places = self._keys if kind == "k" else self._values
        least = _moved(_moved(getattr(self.widths, kind).bits, places), 1)
        return max(least, _moved(bits, -self.cut))


def _sorting(given: CacheSettings, tokens: TokenPolicy) -> dict[str, Any]:
    """Return tiers with a page: that of the layout if a flush, or two of them, can be cut into such pages."""
    for flush in (tokens.flush, 2 * tokens.flush):
        longer = tokens.model_copy(update={"flush": flush})
        if flush <= LONGEST_FLUSH and not list(longer.faults(LAYOUT["page"])):
            return {"tokens": longer}
    return {"tokens": tokens, "page": given.page}


def _filled(
    layers: dict[int, LayerPlan],
    wider: dict[int, LayerPlan],
    cache: CacheSettings,
    model: ModelInfo,
    stored_bits: float,
) -> tuple[dict[int, LayerPlan], CacheSettings]:
    """Return layers of which as many of the first ones as there is room for have the next width."""
    best = layers
    for index in sorted(layers)[:-1]:
        more = {**best, index: wider[index]}
        if _bits_if_any(more, cache, model) > stored_bits + SLACK:
            break
        best = more
    return best, cache


def _evicting(
    preset: Preset, widths: Widths, tokens: TokenPolicy, model: ModelInfo, stored_bits: float
) -> tuple[dict[int, LayerPlan], CacheSettings]:
    """Return layers of a preset's widths that evict no more than is needed, in the shortest flush that serves.

    Layers that keep all tokens may leave too little room: then all widths are lowered as far as it takes.
    """
    for step, flush in product(range(0, STEPS[-1] - 1, -1), EVICTION_FLUSHES):
        plain = _Rung(preset, widths, step).layers(model)
        quantizes = any(of.window_bits < FULL_PRECISION_BITS for layer in plain.values() for of, _ in layer.tensors)
        page = EVICTION_PAGE if quantizes else BUDGET_PAGE
        shares = {"tokens": tokens.model_copy(update={"evict": 0.5, "flush": flush}), "page": page}
        cache = CacheSettings.model_validate({**LAYOUT, **preset.cache.axes, **shares})
        if (whole := _bits(plain, cache.model_copy(update={"tokens": None}), model)) <= stored_bits:
            raise ValueError(f"with nothing evicted it takes {whole:.2f}")
        found = _least_evicted(preset, plain, cache, model, stored_bits)
        if found is not None:
            return found, cache
    raise ValueError(f"one page of {EVICTION_FLUSHES[-1]} tokens, in every layer that evicts, takes more")


def _least_evicted(
    preset: Preset, plain: dict[int, LayerPlan], cache: CacheSettings, model: ModelInfo, stored_bits: float
) -> dict[int, LayerPlan] | None:
    """Return layers with the smallest share to evict that leaves a size; None if a flush is too short for it."""
    parts = len(plain) * (cache.tokens.flush // cache.page if cache.tokens else 1)

    def evicting(part: int) -> dict[int, LayerPlan] | None:
        try:
            return _slope(preset, part / parts).put_on(plain, cache)
        except ValueError:
            return None

    def saved(part: int) -> float:
        layers = evicting(part)
        return 0.0 if layers is None else -_bits(layers, cache, model)

    part = bisect_left(range(parts), -stored_bits - SLACK, lo=1, key=saved)
    found = evicting(part) if part < parts else None
    must_sort = cache.tokens is not None and cache.tokens.score in READ_AGAIN
    if found is not None and must_sort and any(layer.settings(cache).tokens is None for layer in found.values()):
        return None
    return found


def _slope(preset: Preset, share: float) -> Pyramid:
    """Return a mean share to evict with a preset's difference between its ends, as far as it fits."""
    ends = None if preset.tokens is None else preset.tokens.evict
    half = 0.0 if ends is None else (ends.last - ends.first) / 2
    half = max(-share, share - 1, min(half, share, 1 - share))
    line = EvictedByDepth(first=share - half, last=min(share + half, 0.9999))
    return Pyramid(evict=line) if preset.tokens is None else Pyramid(evict=line, whole=preset.tokens.whole)


def _keeping(
    preset: Preset, widths: Widths, tokens: TokenPolicy, model: ModelInfo, most: int, context: int
) -> tuple[dict[int, LayerPlan], CacheSettings]:
    """Return layers that keep as many tokens, as a preset ranks them, as `most` bytes of a context have room for."""
    plain = _Rung(preset, widths, 0).layers(model)

    def keeping(keep: int) -> tuple[dict[int, LayerPlan], CacheSettings]:
        cache = _with_keep(preset.cache, tokens, keep)
        return _kept_by_depth(preset, tokens, keep).put_on(plain, cache), cache

    def taken(keep: int) -> int:
        try:
            return Plan.build(model, *keeping(keep)).cache_bytes(context).total
        except (ValueError, PlanError):
            return 0  # too few to keep anything beside sinks and window; more take more

    numbers = range(BUDGET_PAGE, context + 1, BUDGET_PAGE)
    found = bisect_right(numbers, most, key=taken)
    if not found or not taken(numbers[found - 1]):
        raise ValueError("its sinks and its window alone take more")
    return keeping(numbers[found - 1])


def _with_keep(cache: CacheSettings, tokens: TokenPolicy, keep: int) -> CacheSettings:
    """Return a preset's settings with another number of tokens, of which the window is the same share."""
    of = max(1, (tokens.keep or 1) - cache.sink)
    window = cache.window.keep(0, FULL_PRECISION_BITS) * max(0, keep - cache.sink) // of
    changed = {
        **LAYOUT,
        **cache.axes,
        "sink": cache.sink,
        "page": cache.page,
        "window": {"kind": "recent", "tokens": window},
        "tokens": tokens.model_copy(update={"keep": keep}),
    }
    return CacheSettings.model_validate(changed)


def _kept_by_depth(preset: Preset, tokens: TokenPolicy, keep: int) -> Pyramid:
    """Return numbers of tokens by depth in a preset's proportions, the same everywhere if it has none."""
    ends = None if preset.tokens is None else preset.tokens.keep
    if ends is None or not tokens.keep:
        return Pyramid(keep=KeptByDepth(first=keep, last=keep))
    return Pyramid(keep=KeptByDepth(first=ends.first * keep // tokens.keep, last=ends.last * keep // tokens.keep))


def _moved(bits: int, places: int) -> int:
    """Return the width some places after, or before, another one, as far as there are any."""
    return WIDTHS[min(max(WIDTHS.index(bits) + places, 0), len(WIDTHS) - 1)]


def _bits_if_any(layers: dict[int, LayerPlan], cache: CacheSettings, model: ModelInfo) -> float:
    """Return stored bits, and infinity for widths that the codec of a preset does not have."""
    try:
        return _bits(layers, cache, model)
    except ValueError:
        return math.inf


def _bits(layers: dict[int, LayerPlan], cache: CacheSettings, model: ModelInfo) -> float:
    return mean_bits(layers, cache, model, "stored")
