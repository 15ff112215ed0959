"""Trials of the Triton kernels for attention: random problems against the definition in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ...layout import FULL_PRECISION_BITS, Kind, PageLayout
from ...pages import Channels, Packed, Plain
from ...quantize.naive import quantize
from ...runtime import trial
from ...segments import Segments
from .. import naive
from ..problem import AttentionProblem
from . import coded_trial
from .launch import attend, plain_parts, run_layouts

BATCH, KV_HEADS = 2, 4
SINKS, PAGES, TAIL = 3, 3, 20


@dataclass(frozen=True)
class AttentionKind:
    """A kind of attention: everything that Triton compiles by itself.

    Attributes:
        device: the GPU.
        dtypes: of queries and of the cache.
        page: tokens of a page.
        keys: runs of channels, layouts or numbers of channels in full precision; empty if nothing is packed.
        is_sorted: whether channels of keys are sorted.
        values: their layout, or None.
        dims: channels of keys and of values.
        ratio: query heads to a KV head.
        queries: a power of two, at most `coded_trial.MOST_QUERIES`.
        mask: its dtype, or None.
        softcap: whether there is one.
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


def is_trusted(problem: AttentionProblem) -> bool:
    """Return whether the kernels get this right, as far as trials can tell; if not, one warning names it.

    The first call on a device tries a handful of kinds before those of the problem. If one of them fails, the kernels
    are not used on that device at all.
    """
    return not trial.is_due() or (
        all(map(passes, first_kinds(problem.query.device)))
        and all(map(passes, _kinds_of(problem)))
        and coded_trial.is_passed(problem)
    )


def first_kinds(device: torch.device) -> list[AttentionKind]:
    """Return the kinds that are tried before anything else on a device."""
    key = functools.partial(PageLayout, "key", head_dim=64, page=64, group_size=32)
    value = functools.partial(PageLayout, "value", head_dim=64, page=64, group_size=32)
    half, whole = (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)
    return [
        AttentionKind(device, half, 64, (key(bits=2),), False, value(bits=4), (64, 64), 4, 1, None, False),
        AttentionKind(device, whole, 64, (key(bits=3),), False, value(bits=1), (64, 64), 2, 4, torch.bool, True),
    ]


@functools.cache
def passes(kind: AttentionKind) -> bool:
    """Return whether attention of this kind agrees with the definition; if not, one warning names it."""
    return trial.passes(f"attention over {kind}", functools.partial(_failure, kind))


def _kinds_of(problem: AttentionProblem) -> Iterator[AttentionKind]:
    """Yield the kind of attention of each part of a problem."""
    queries = min(coded_trial.MOST_QUERIES, int(triton.next_power_of_2(problem.queries)))
    masking = None if problem.mask is None else problem.mask.dtype
    for index, part in enumerate(plain_parts(problem, with_masks=False)):
        keys, values = part.key.runs, part.value.runs
        yield AttentionKind(
            problem.query.device,
            (problem.query.dtype, part.key.tail.dtype),
            next((run.page for run in (*keys, *values)), 0),
            run_layouts(part.key),
            isinstance(part.key.packed, Channels),
            next((run.layout for run in values if isinstance(run, Packed)), None),
            (problem.head_dim, problem.value_dim),
            problem.ratio,
            queries,
            torch.bool if index and masking is None and (queries > 1 or problem.is_coded) else masking,  # only the past
            problem.softcap is not None,
        )


def _failure(kind: AttentionKind) -> str | None:
    generator = torch.Generator().manual_seed(trial.SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(BATCH, KV_HEADS, *shape, generator=generator).to(kind.device, kind.dtypes[1])

    key, value = _segments(kind, "key", random), _segments(kind, "value", random)
    query = random(kind.ratio, kind.queries, kind.dims[0]).flatten(1, 2).to(kind.dtypes[0])
    problem = AttentionProblem(
        query,
        key,
        value,
        scaling=0.5 * kind.dims[0] ** -0.5,  # random keys at 1 bit are long
        mask=coded_trial.random_mask(kind.mask, random(kind.queries, key.shape[2])[:, :1]),
        softcap=20.0 if kind.softcap else None,
    )
    return coded_trial.difference(attend(problem), naive.attend(replace(problem, query=query.double())))


def _segments(kind: AttentionKind, of: Kind, random: Callable[..., Tensor]) -> Segments:
    """Make random keys or values: a sink, pages and a tail, or, where nothing of them is packed, as many tokens."""
    width = kind.dims[of == "value"]
    runs = kind.keys if of == "key" else () if kind.values is None else (kind.values,)
    if not runs:
        return Segments(None, None, random(SINKS + (PAGES * kind.page) + TAIL, width))
    pages = tuple(_run(run, kind.page, random) for run in runs)
    packed: Packed | Channels = pages[0]  # type: ignore[assignment]
    if of == "key" and kind.is_sorted:
        orders = random(PAGES, width).argsort(-1).to(torch.uint8)
        packed = Channels(orders, 1, pages)
    return Segments(random(SINKS, width), packed, random(TAIL, width))


def _run(run: PageLayout | int, page: int, random: Callable[..., Tensor]) -> Packed | Plain:
    if isinstance(run, int):
        return Plain(random(PAGES, run, page))
    return Packed(run, *quantize(random(PAGES, page, run.head_dim), run))


def _bits(run: PageLayout | int | None) -> int:
    return run.bits if isinstance(run, PageLayout) else FULL_PRECISION_BITS
