"""Trials of attention over transform codes: random problems against the definition in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ...layout import Kind
from ...pages import Coded
from ...runtime import trial
from ...segments import Segments
from ...transform import Frames, TransformBasis
from ...transform import naive as transform
from ...transform_layout import TransformLayout
from .. import naive
from ..problem import AttentionProblem
from .launch import attend

LIMIT = 5e-3
"""Relative RMS error, as in the tests."""
MOST_QUERIES = 16
BATCH, SINKS, TAIL, TOKENS = 2, 3, 20, 512
WIDEST = (6, 3)
"""Bits of the first directions of each KV head; those of the last are 0."""


@dataclass(frozen=True)
class CodedKind:
    """A kind of attention over transform codes: everything that Triton compiles by itself.

    Attributes:
        device: the GPU.
        dtypes: of queries and of the cache.
        page: tokens of a page.
        dims: channels of keys and of values.
        ratio: query heads to a KV head.
        queries: a power of two, at most `MOST_QUERIES`.
        mask: its dtype, or None.
        softcap: whether there is one.
        has_exact: whether there are exact tokens.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]
    page: int
    dims: tuple[int, int]
    ratio: int
    queries: int
    mask: torch.dtype | None
    softcap: bool
    has_exact: bool

    def __str__(self) -> str:
        heads = f"{self.ratio} query heads of {self.dims[0]} channels to a KV head, pages of {self.page}"
        return f"transform codes ({heads}, {self.dtypes[0]})".replace("torch.", "")


def is_passed(problem: AttentionProblem) -> bool:
    """Return whether a trial of the problem's transform codes finds nothing wrong, or there are none."""
    packed = problem.key.packed
    if not isinstance(packed, Coded) or packed.pages == 0:
        return True
    kind = CodedKind(
        problem.query.device,
        (problem.query.dtype, problem.key.tail.dtype),
        packed.page,
        (problem.head_dim, problem.value_dim),
        problem.ratio,
        min(MOST_QUERIES, int(triton.next_power_of_2(problem.queries))),
        None if problem.mask is None else problem.mask.dtype,
        problem.softcap is not None,
        packed.exact is not None and packed.exact.numel() > 0,
    )
    return passes(kind)


@functools.cache
def passes(kind: CodedKind) -> bool:
    """Return whether attention of this kind agrees with the definition; if not, one warning names it."""
    return trial.passes(f"attention over {kind}", functools.partial(_failure, kind))


def difference(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    """Return what is wrong with results, such as output and logarithms, or None."""
    errors = [((one.double() - other).norm() / other.norm()).item() for one, other in zip(got, expected, strict=True)]
    return None if max(errors) < LIMIT else f"relative RMS error {max(errors):.2g}, more than {LIMIT}"


def _failure(kind: CodedKind) -> str | None:
    draw = torch.Generator().manual_seed(trial.SEED)
    pages = max(2, TOKENS // kind.page)
    places = torch.rand(BATCH, len(WIDEST), pages * kind.page, generator=draw).argsort(-1)[..., :pages].sort().values
    key, value = (_segments(kind, of, pages, places, draw) for of in ("key", "value"))
    query = torch.randn(BATCH, kind.ratio * len(WIDEST), kind.queries, kind.dims[0], generator=draw)
    problem = AttentionProblem(
        query.to(kind.device, kind.dtypes[0]),
        key,
        value,
        scaling=0.5 * kind.dims[0] ** -0.5,
        mask=random_mask(kind.mask, torch.randn(BATCH, 1, kind.queries, key.shape[2], generator=draw).to(kind.device)),
        softcap=20.0 if kind.softcap else None,
    )
    return difference(attend(problem), naive.attend(replace(problem, query=problem.query.double())))


def _segments(kind: CodedKind, of: Kind, pages: int, places: Tensor, draw: torch.Generator) -> Segments:
    """Make random keys or values: a sink, pages of which some tokens may be exact, and a tail."""
    width = kind.dims[of == "value"]
    states = torch.randn(BATCH, len(WIDEST), SINKS + pages * kind.page + TAIL, width, generator=draw)
    sink, middle, tail = states.to(kind.device, kind.dtypes[1]).split([SINKS, pages * kind.page, TAIL], dim=2)
    basis = random_basis(of, width, kind.page, kind.device, draw, exact=int(kind.has_exact))
    found = transform.encode(middle.unflatten(2, (pages, kind.page)), basis)
    if not kind.has_exact:
        return Segments(sink, Coded(basis, found.codes, found.scales), tail)
    places = places.to(kind.device)
    exact = middle.gather(2, places[..., None].expand(*places.shape, width))
    return Segments(sink, Coded(basis, found.codes, found.scales, places.int(), exact), tail)


def random_basis(
    of: Kind, width: int, page: int, device: torch.device, draw: torch.Generator, exact: int = 0
) -> TransformBasis:
    """Return random directions of `width` channels of as many KV heads as `WIDEST`; keys are turned to frames."""
    runs = -(-width // 8)
    widths = tuple(tuple(most - run * (most + 1) // runs for run in range(runs)) for most in WIDEST)
    layout = TransformLayout(of, widths, width, page, exact)
    encoder = torch.linalg.qr(torch.randn(len(WIDEST), width, width, generator=draw))[0]
    mean = 0.1 * torch.randn(len(WIDEST), width, generator=draw)
    made = (encoder, encoder.mT.contiguous(), mean, torch.ones(len(WIDEST), width))
    matrix, inverse, means, deviation = (part.to(device) for part in made)
    frequencies = torch.linspace(1, 0, width // 2, device=device).double() if of == "key" else None
    frames = None if frequencies is None else Frames(max(256, page), frequencies)
    return TransformBasis(layout, matrix, inverse, means, deviation, frames)


def random_mask(dtype: torch.dtype | None, random: Tensor) -> Tensor | None:
    """Make a random mask, under which every query attends to something; None where the dtype of masks is None."""
    if dtype is None:
        return None
    mask = random > 0
    mask[..., -1] = True
    return mask if dtype == torch.bool else torch.zeros_like(random).masked_fill(~mask, -torch.inf).to(dtype)
