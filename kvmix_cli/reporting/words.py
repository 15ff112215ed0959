"""What a plan's transforms and policies do, in words."""

from __future__ import annotations

from ..plan import CacheSettings
from ..plan.policies import Balance, Center, ChannelPolicy, Rotate, TokenPolicy, Transform, Transforms

LABELS = {"transforms": "stored:", "tokens": "tokens:", "channels": "runs:"}


def axes_lines(cache: CacheSettings) -> list[str]:
    """A line for each axis that is set, for the foot of a table."""
    return [f"{LABELS[name]:9}{in_words(axis)}" for name, axis in cache.axes.items()]


def in_words(axis: Transforms | TokenPolicy | ChannelPolicy | None) -> str:
    """`keys balanced, then rotated; values rotated`; `none` for an axis that is not set."""
    if axis is None:
        return "none"
    if isinstance(axis, Transforms):
        return _transforms(axis)
    return _tokens(axis) if isinstance(axis, TokenPolicy) else _channels(axis)


def _transforms(transforms: Transforms) -> str:
    both = {"keys": transforms.k, "values": transforms.v}
    return "; ".join(f"{what} {', then '.join(map(_done, steps))}" for what, steps in both.items() if steps)


def _done(step: Transform) -> str:
    if isinstance(step, Balance):
        return "balanced"
    if isinstance(step, Center):
        return "centered" + (f" by {step.means}" if step.means else "")
    assert isinstance(step, Rotate)
    return f"rotated by {step.matrix}" if step.matrix else "rotated" + (f" (seed {step.seed})" if step.seed else "")


def _tokens(policy: TokenPolicy) -> str:
    """`by attention: 20 % at k8v8, 80 % at the layer's bits; 160 at a time`."""
    *tiers, own, evicted = (f"{100 * float(share):.4g} %" for share in policy.shares)
    parts = [f"{share} at k{tier.k}v{tier.v}" for share, tier in zip(tiers, policy.tiers, strict=True)]
    parts.append(f"{own} at the layer's bits")
    if policy.evict:
        parts.append(f"{evicted} evicted")
    return f"by {policy.score}: {', '.join(parts)}; {policy.flush} at a time"


def _channels(policy: ChannelPolicy) -> str:
    """`of keys, by query-range: 10 % at 16 bits, the rest at the layer's; sorted anew every 128 tokens`."""
    parts = [
        f"{run.channels if run.share is None else f'{100 * run.share:.4g} %'} at {run.bits} bits" for run in policy.runs
    ]
    when = f"anew every {policy.refresh} tokens" if policy.refresh else "once"
    return f"of keys, by {policy.score}: {', '.join(parts)}, the rest at the layer's; sorted {when}"
