"""Words for a plan's transforms and policies, and strips of blocks for numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

from ..counting import counted
from ..plan import CacheSettings, ModelInfo, Plan, TransformSettings
from ..plan.channels import ChannelPolicy
from ..plan.document.geometry import format_ranges
from ..plan.layers import HeadGroup
from ..plan.page_codecs import PageCodecs
from ..plan.reading import SelectiveReading
from ..plan.settings import Axis
from ..plan.tokens import TokenPolicy, TokenShares
from ..plan.transforms import Center, Rotate, Transform, Transforms

LABELS = {"transforms": "stored:", "tokens": "tokens:", "channels": "runs:", "reading": "read:", "codecs": "codec:"}
EIGHTHS = "▏▎▍▌▋▊▉"


class LayerFacts(TypedDict):
    """The layers of a model, as `run` and `eval` print them under `--json`."""

    quantized: int
    total: int
    full_precision: int
    stock: dict[str, int]


def blocks(value: float, largest: float, width: int = 12, *, ascii_only: bool = False) -> str:
    """Return a value as a strip of blocks, `width` of them for the largest value.

    Args:
        value: number to show.
        largest: number that a whole strip stands for.
        width: blocks of a whole strip.
        ascii_only: use `#`, for an output that cannot show block characters.
    """
    share = 0.0 if largest <= 0 else min(1.0, max(0.0, value / largest))
    if ascii_only:
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def layers_text(model: ModelInfo, plan: Plan | None = None) -> str:
    """Return `quantized 20 of 24 layers; 4 sliding, not quantized`; empty if all layers are quantized.

    Args:
        plan: plan that was applied; without one, all layers that a plan can decide about count as quantized.
    """
    facts = layers_json(model, plan)
    rest = [f"{count} {_kind(kind)}" for kind, count in facts["stock"].items()]
    rest += [f"{facts['full_precision']} at 16 bits"] if facts["full_precision"] else []
    text = f"quantized {facts['quantized']} of {facts['total']} layers; {', '.join(rest)}, not quantized"
    return text if rest else ""


def layers_json(model: ModelInfo, plan: Plan | None = None) -> LayerFacts:
    """Return the number of layers that are quantized, that stay at 16 bits, and that keep each kind of stock cache."""
    whole = () if plan is None else (layer for layer in plan.layers.values() if not layer.head_groups)
    full = sum(layer.short == "k16v16" for layer in whole)
    return {
        "quantized": len(model.quantizable) - full,
        "total": model.layers,
        "full_precision": full,
        "stock": model.stock_counts,
    }


def _kind(kind: str) -> str:
    """Return `sliding` for `sliding_attention`; layers with a shared cache, or without attention, are `dummy`."""
    return "without a cache" if kind == "dummy" else kind.removesuffix("_attention").replace("_", " ")


def heads_text(model: ModelInfo) -> str:
    """Return `2 x 64 in layers 0-3, 1 x 512 (values 64) in layers 4`: KV heads x channels of the layers."""
    return ", ".join(f"{heads} in layers {format_ranges(layers)}" for heads, layers in model.geometries.items())


def axes_lines(cache: CacheSettings) -> list[str]:
    """Return a line for each of transform, transforms, tokens, channels, reading and codecs that is set."""
    codes = [] if cache.transform is None else [f"codes:   {codes_in_words(cache.transform)}"]
    return codes + [f"{LABELS[name]:9}{in_words(axis)}" for name, axis in cache.axes.items()]


def codes_in_words(settings: TransformSettings) -> str:
    """Return `basis FILE, frames of 1024 positions, 1 exact token of each page and KV head`."""
    frames = "no frames" if settings.frame is None else f"frames of {settings.frame} positions"
    exact = f"{counted(settings.exact, 'exact token')} of each page and KV head"
    return f"basis {settings.basis}, {frames}, {exact}"


def in_words(axis: Axis | None) -> str:
    """Return `keys balanced, then rotated; values rotated`; `none` for transforms or a policy that is not set."""
    if axis is None:
        return "none"
    if isinstance(axis, Transforms):
        both = {"keys": axis.k, "values": axis.v}
        return "; ".join(f"{what} {', then '.join(map(_transform, steps))}" for what, steps in both.items() if steps)
    if isinstance(axis, SelectiveReading):
        return _reading(axis)
    if isinstance(axis, PageCodecs):
        return "; ".join(f"{what} {name}" for what, name in {"keys": axis.k, "values": axis.v}.items() if name)
    return _tokens(axis) if isinstance(axis, TokenPolicy) else _channels(axis)


def _transform(step: Transform) -> str:
    if isinstance(step, Rotate):
        seed = f" (seed {step.seed})" if step.seed else ""
        return f"rotated by {step.matrix}" if step.matrix else f"rotated{seed}"
    if isinstance(step, Center):
        return "centered" + (f" by {step.means}" if step.means else "")
    return "balanced"


def _tokens(policy: TokenPolicy) -> str:
    """Return `by attention: 20 % at k8v8, 80 % at the layer's bits; 160 at a time`."""
    if policy.keep is not None:
        parts = [f"{policy.keep} kept, sinks and window included"]
    else:
        *tiers, own, evicted = (f"{100 * float(share):.4g} %" for share in policy.shares)
        parts = [f"{share} at k{tier.k}v{tier.v}" for share, tier in zip(tiers, policy.tiers, strict=True)]
        parts.append(f"{own} at the layer's bits")
        if policy.evict:
            parts.append(f"{evicted} evicted" + (f" and merged by {policy.merge}" if policy.merge else ""))
        if policy.sure is not None:
            parts.append(f"KV heads alike in {100 * policy.sure:.4g} % of that and by the prompt in the rest")
        if policy.weigh:
            parts.append(f"each of these counted as {math.exp(policy.log_weight):.4g}")
        if policy.by_layer is not None:
            parts.append(f"layers share as the {policy.by_layer} of the prompt's attention has it")
    of_prompt = ", of the prompt only" if policy.when == "prompt" else ""
    images = f", images {policy.images}" if policy.images else ""
    return f"by {policy.score}{images}: {', '.join(parts)}{of_prompt}; {policy.flush} at a time"


def _reading(reading: SelectiveReading) -> str:
    """Return `the best pages of 2048 tokens, by the mean of their keys; layers 0-1 read everything`."""
    part = f"{100 * reading.share:.4g} %" if reading.share is not None else f"{reading.tokens} tokens"
    by = {"mean": "the mean of their keys", "range": "the range of their keys", "codes": "codes of their keys"}[
        reading.summary
    ]
    skipped = f"; everything in the first {counted(reading.skip, 'layer')}" if reading.skip else ""
    return f"the best pages of {part}, by {by}{skipped}"


def own_tokens(tokens: TokenShares | None) -> str:
    """Return `tiers 20 %, 25 % evicted`, `512 kept` or `all kept` of a layer's own tokens; empty for none."""
    if tokens is None:
        return ""
    if tokens.keep is not None:
        return f"{tokens.keep} kept"
    parts = [] if tokens.tiers is None else [f"tiers {', '.join(f'{100 * share:.4g} %' for share in tokens.tiers)}"]
    parts += [] if tokens.evict is None else [f"{100 * tokens.evict:.4g} % evicted" if tokens.evict else "all kept"]
    return ", ".join(parts)


def own_heads(groups: Sequence[HeadGroup]) -> str:
    """Return `heads 1,3: k4v2, 512 kept; head 2: all kept` for groups of KV heads; empty for none."""
    return "; ".join(
        f"{_heads(group)}: {', '.join(filter(None, (_widths(group), own_tokens(group.tokens))))}" for group in groups
    )


def _heads(group: HeadGroup) -> str:
    return f"head{'s' if len(group.heads) > 1 else ''} {','.join(map(str, group.heads))}"


def _widths(group: HeadGroup) -> str:
    """Return `k4v2`, or what of it the group has of its own."""
    return "".join(f"{kind}{tensor.short}" for kind, tensor in (("k", group.k), ("v", group.v)) if tensor is not None)


def _channels(policy: ChannelPolicy) -> str:
    """Return `of keys, by query-range: 10 % at 16 bits, the rest at the layer's; sorted anew every 128 tokens`."""
    parts = [
        f"{group.channels if group.share is None else f'{100 * group.share:.4g} %'} at {group.bits} bits"
        for group in policy.runs
    ]
    when = f"anew every {policy.refresh} tokens" if policy.refresh else "once"
    return f"of keys, by {policy.score}: {', '.join(parts)}, the rest at the layer's; sorted {when}"
