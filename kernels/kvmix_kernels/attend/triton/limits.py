"""What the Triton kernels for attention take."""

from __future__ import annotations

import torch
from torch import Tensor

from ...pages import Channels, Packed, Plain
from ...segments import Segments
from ...tiers import Tiers
from ..parts import Part, parts_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_PAGE = 16
MOST_GROUPS = 8
MOST_CHANNELS = 256
MOST_RUNS = 4


def unsupported(query: Tensor, key: Segments, value: Segments) -> str | None:
    """What the kernels cannot take of these, for a warning; None if they take all."""
    parts = unmasked_parts(query, key, value)
    return next((reason for part in parts if (reason := _unsupported(query, part.key, part.value))), None)


def unmasked_parts(query: Tensor, key: Segments, value: Segments) -> list[Part]:
    """Keys and values as parts, without the masks and what it costs to make them."""
    return parts_of(query[:, :, -1:] if isinstance(key.packed, Tiers) else query, key, value, None)


def runs_of(packed: Packed | Channels | Tiers | None) -> tuple[Packed | Plain, ...]:
    """The runs of channels in which pages that are not in tiers are stored."""
    if isinstance(packed, Tiers):
        raise AssertionError("tiers are attended to one by one")
    if packed is None or packed.pages == 0:
        return ()
    return packed.runs if isinstance(packed, Channels) else (packed,)


def _unsupported(query: Tensor, key: Segments, value: Segments) -> str | None:
    for tensor in (query, key.tail, value.tail):
        channels = tensor.shape[3]
        if tensor.dtype not in DTYPES or tensor.stride(3) != 1:
            return f"{query.dtype} queries over {key.tail.dtype} keys".replace("torch.", "")
        if channels > MOST_CHANNELS or channels % 16:
            return f"heads of {key.shape[3]} and {value.shape[3]} channels"
    if isinstance(value.packed, Channels):
        return "values in runs of channels"
    runs = [*runs_of(key.packed), *runs_of(value.packed)]
    for run in runs:
        if run.page < SMALLEST_PAGE or run.page & (run.page - 1):
            return f"pages of {run.page} tokens"
    layouts = [run.layout for run in runs if isinstance(run, Packed)]
    for layout in layouts:
        if layout.groups > MOST_GROUPS or layout.group < 16:
            return f"{layout.kind}s in groups of {layout.group}"
        if layout.kind == "key" and layout.group & (layout.group - 1):
            return f"keys in groups of {layout.group}"
    if len(runs_of(key.packed)) > MOST_RUNS:
        return f"keys in {len(runs_of(key.packed))} runs of channels"
    if len(groups := {layout.group for layout in layouts if layout.kind == "key"}) > 1:
        return f"keys in runs of channels with groups of {' and '.join(map(str, sorted(groups)))}"
    if not _begin_together(key, value, runs):
        return "keys and values whose pages do not begin at the same tokens"
    return None


def _begin_together(key: Segments, value: Segments, runs: list[Packed | Plain]) -> bool:
    """Whether pages are of the same tokens, and no tensor has tokens in its tail that another has in its sink."""
    sinks = max(key.sinks, value.sinks)
    for tensor in (key, value):
        if tensor.sinks not in (0, sinks) or (tensor.packed is not None and tensor.sinks != sinks):
            return False
    return len({run.page for run in runs}) <= 1
