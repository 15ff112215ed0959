"""The trial of the Triton kernels for attention: random problems against the definition in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from ... import trial
from ...layout import FULL_PRECISION_BITS, PageLayout
from ...pages import Channels, Packed, Plain
from ...quantize.naive import quantize
from ...segments import Segments
from .. import naive
from .launch import attend
from .limits import runs_of, unmasked_parts

LIMIT = 5e-3
"""Relative RMS error, as in the tests."""
KINDS: Final = ("key", "value")
BATCH, KV_HEADS = 2, 4
SINKS, PAGES, TAIL = 3, 3, 20
MOST_QUERIES = 16


class Kind(NamedTuple):
    """A kind of attention: what is compiled by itself.

    Attributes:
        dtypes: of queries and of the cache.
        keys: runs of channels, layouts or numbers of channels in full precision; empty if nothing is packed.
        is_sorted: whether channels of keys are sorted.
        values: their layout, or None.
        dims: channels of keys and of values.
        ratio: query heads to a KV head.
        queries: a power of two, at most `MOST_QUERIES`.
        mask: its dtype, or None.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]
    page: int
    keys: tuple[PageLayout | int, ...]
    is_sorted: bool
    values: PageLayout | None
    dims: tuple[int, int]
    ratio: int
    queries: int
    mask: torch.dtype | None
    softcap: bool

    def __str__(self) -> str:
        keys = "+".join(str(_bits(run)) for run in self.keys) or FULL_PRECISION_BITS
        heads = f"{self.ratio} query heads of {self.dims[0]} channels to a KV head, pages of {self.page}"
        return f"K{keys} V{_bits(self.values)} ({heads}, {self.dtypes[0]})".replace("torch.", "")


def is_trusted(query: Tensor, key: Segments, value: Segments, mask: Tensor | None, softcap: float | None) -> bool:
    """Whether the kernels get this right, as far as trials can tell; if not, one warning names it."""
    return not trial.is_due() or all(passes(kind) for kind in _kinds(query, key, value, mask, softcap))


def first_kinds(device: torch.device) -> list[Kind]:
    """A handful, tried before anything else on a device."""
    key, value = (functools.partial(PageLayout, kind, head_dim=64, page=64, group_size=32) for kind in KINDS)
    half, whole = (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)
    return [
        Kind(device, half, 64, (key(bits=2),), False, value(bits=4), (64, 64), 4, 1, None, False),
        Kind(device, whole, 64, (key(bits=3),), False, value(bits=1), (64, 64), 2, 4, torch.bool, True),
    ]


@functools.cache
def passes(kind: Kind) -> bool:
    """Whether attention of this kind agrees with the definition; if not, one warning names it."""
    return trial.passes(f"attention over {kind}", functools.partial(_failure, kind))


def _kinds(query: Tensor, key: Segments, value: Segments, mask: Tensor | None, softcap: float | None) -> Iterator[Kind]:
    """The kinds of attention that the parts of this are."""
    queries = min(MOST_QUERIES, triton.next_power_of_2(query.shape[2]))
    masking = None if mask is None else mask.dtype
    for index, part in enumerate(unmasked_parts(query, key, value)):
        keys, values = runs_of(part.key.packed), runs_of(part.value.packed)
        yield Kind(
            query.device,
            (query.dtype, part.key.tail.dtype),
            next((run.page for run in (*keys, *values)), 0),
            tuple(run.layout if isinstance(run, Packed) else run.width for run in keys),
            isinstance(part.key.packed, Channels),
            next((run.layout for run in values if isinstance(run, Packed)), None),
            (query.shape[3], value.shape[3]),
            query.shape[1] // key.shape[1],
            queries,
            torch.bool if index and masking is None and queries > 1 else masking,  # all of a tier is in the past
            softcap is not None,
        )


def _failure(kind: Kind) -> str | None:
    generator = torch.Generator().manual_seed(trial.SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(BATCH, KV_HEADS, *shape, generator=generator).to(kind.device, kind.dtypes[1])

    key, value = _segments(kind, "key", random), _segments(kind, "value", random)
    query = random(kind.ratio, kind.queries, kind.dims[0]).flatten(1, 2).to(kind.dtypes[0])
    options = {
        "scaling": 0.5 * kind.dims[0] ** -0.5,  # random keys at 1 bit are long
        "mask": _mask(kind, random(kind.queries, key.shape[2])[:, :1]),
        "softcap": 20.0 if kind.softcap else None,
    }
    got, expected = attend(query, key, value, **options), naive.attend(query.double(), key, value, **options)
    errors = [((one.double() - other).norm() / other.norm()).item() for one, other in zip(got, expected, strict=True)]
    return None if max(errors) < LIMIT else f"relative RMS error {max(errors):.2g}, more than {LIMIT}"


def _segments(kind: Kind, side: Literal["key", "value"], random: Callable[..., Tensor]) -> Segments:
    """Random keys or values: a sink, pages and a tail, or, where nothing of them is packed, as many tokens."""
    width = kind.dims[side == "value"]
    runs = kind.keys if side == "key" else () if kind.values is None else (kind.values,)
    if not runs:
        return Segments(None, None, random(SINKS + (PAGES * kind.page) + TAIL, width))
    pages = tuple(_run(run, kind.page, random) for run in runs)
    packed: Packed | Channels = pages[0]  # type: ignore[assignment]
    if side == "key" and kind.is_sorted:
        orders = random(PAGES, width).argsort(-1).to(torch.uint8)
        packed = Channels(orders, 1, pages)
    return Segments(random(SINKS, width), packed, random(TAIL, width))


def _run(run: PageLayout | int, page: int, random: Callable[..., Tensor]) -> Packed | Plain:
    if isinstance(run, int):
        return Plain(random(PAGES, run, page))
    return Packed(run, *quantize(random(PAGES, page, run.head_dim), run))


def _mask(kind: Kind, random: Tensor) -> Tensor | None:
    """A random mask, under which every query sees something."""
    if kind.mask is None:
        return None
    mask = random > 0
    mask[..., -1] = True
    return mask if kind.mask == torch.bool else torch.zeros_like(random).masked_fill(~mask, -torch.inf).to(kind.mask)


def _bits(run: PageLayout | int | None) -> int:
    return run.bits if isinstance(run, PageLayout) else FULL_PRECISION_BITS
