"""Numbers as the formats of other engines give them back: quantized and dequantized at once, `[..., D]` to `[..., D]`.

Each token and head stands alone in all of these formats, so that what a cache returns does not depend on how many
tokens came at once. Rules are read from the engines' sources, as named in `plan/engines/formats.py`; the tests compare
with llama.cpp's own quantizers and with values of vLLM's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from ...plan.engines.formats import LEAST_TURN, EngineFormat
from ..transforms.rotation import sylvester

Rounding = Callable[[Tensor], Tensor]
"""A function from keys or values to what an engine reads back, in float32."""

FP8 = torch.float8_e4m3fn
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Middles between neighbours. At a tie the even code wins, as the rounding of IEEE 754 has it."""
_LEAST_SCALE = 1e-6
_TURBO_SCALE = 1e-8
_SEED = 0x9E3779B9
"""Of the signs with which vLLM's int4 begins its rotation."""


def rounding(form: EngineFormat) -> Rounding:
    """Return the function for keys or values in a format. Heads must be such as the format takes."""
    if form.is_full:
        return _half if form.name == "f16" else _whole
    return partial(_turned, _ROUNDINGS[form.name], limit=form.turned) if form.turned else _ROUNDINGS[form.name]


def to_fp8(given: Tensor) -> Tensor:
    """Return the nearest e4m3 numbers; what is beyond their range becomes the largest, not NaN."""
    largest = torch.finfo(FP8).max
    return given.clamp(-largest, largest).to(FP8)


def cast_fp8(given: Tensor) -> Tensor:
    """Return the nearest e4m3 numbers in float32; see `to_fp8`."""
    return to_fp8(given.float()).float()


def _whole(given: Tensor) -> Tensor:
    return given


def _half(given: Tensor) -> Tensor:
    return given.half().float()


def _turned(round_it: Rounding, given: Tensor, limit: int) -> Tensor:
    """Return the rounding of heads that are turned by Hadamard matrices first, and back."""
    dim = given.shape[-1]
    size = min(dim & -dim, limit)
    if size < LEAST_TURN:
        return round_it(given)
    matrix = sylvester(size, given.device)
    blocks = given.float().unflatten(-1, (-1, size)) @ matrix
    read: Tensor = round_it(blocks.flatten(-2)).unflatten(-1, (-1, size)) @ matrix
    return read.flatten(-2)


def _ggml(given: Tensor, bits: int, block: int, has_minimum: bool) -> Tensor:
    """Return llama.cpp's blocks: from the number of largest magnitude, or from minimum and maximum."""
    x: Tensor = given.float().unflatten(-1, (-1, block))
    top = 2**bits - 1
    if has_minimum:
        low, high = x.aminmax(dim=-1, keepdim=True)
        step = (high - low) / top
        codes = ((x - low) * _inverse(step) + 0.5).trunc().clamp(0, top)
        read: Tensor = codes * _half(step) + _half(low)
        return read.flatten(-2)
    middle = 2 ** (bits - 1)
    largest = x.gather(-1, x.abs().argmax(dim=-1, keepdim=True))
    step = largest / -middle
    codes = (x * _inverse(step) + (middle + 0.5)).trunc().clamp(0, top)
    read = (codes - middle) * _half(step)
    return read.flatten(-2)


def _q8_0(given: Tensor, block: int = 32) -> Tensor:
    x: Tensor = given.float().unflatten(-1, (-1, block))
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    read: Tensor = _nearest(x * _inverse(step)) * _half(step)
    return read.flatten(-2)


def _nvfp4(given: Tensor, block: int = 16) -> Tensor:
    """Return e2m1 numbers times an e4m3 scale a block: a sixth of its largest magnitude, with a scale of 1 a tensor."""
    x = given.float().unflatten(-1, (-1, block))
    scale = cast_fp8(x.abs().amax(dim=-1, keepdim=True) / _E2M1[-1])
    ratio = (x * _inverse(scale)).clamp(-_E2M1[-1], _E2M1[-1])
    edges = torch.tensor(_EDGES, device=x.device)
    at = torch.bucketize(ratio.abs().contiguous(), edges)
    at += (at < len(_EDGES)) & (at % 2 == 1) & (ratio.abs() == edges[at.clamp(max=len(_EDGES) - 1)])
    read: Tensor = torch.tensor(_E2M1, device=x.device)[at] * ratio.sign() * scale
    return read.flatten(-2)


def _int8_of_head(given: Tensor) -> Tensor:
    scale = (given.float().abs().amax(dim=-1, keepdim=True) / 127).clamp(min=_LEAST_SCALE)
    return _nearest(given.float() * (1 / scale)).clamp(-128, 127) * scale


def _fp8_of_head(given: Tensor) -> Tensor:
    scale = (given.float().abs().amax(dim=-1, keepdim=True) / torch.finfo(FP8).max).clamp(min=_LEAST_SCALE)
    return cast_fp8(given.float() * (1 / scale)) * scale


def _int4_of_head(given: Tensor) -> Tensor:
    """Return 4-bit codes of heads that random signs and a Hadamard matrix have turned, with an integer zero.

    vLLM keeps the zero in the four lowest bits of the float32 scale, so the scale loses them.
    """
    dim = given.shape[-1]
    size = dim & -dim
    turn = (_signs(size)[:, None].to(given.device) * sylvester(size, given.device)) * math.sqrt(size)
    x = (given.float().unflatten(-1, (-1, size)) @ turn).flatten(-2).to(given.dtype).float()
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=_LEAST_SCALE)
    zero = _nearest(-low / scale).clamp(0, 15)
    codes = _nearest(x * (1 / scale) + zero).clamp(0, 15)
    kept = (scale.view(torch.int32) & -16 | zero.int()).view(torch.float32)
    read = ((codes - zero) * kept).unflatten(-1, (-1, size))
    back: Tensor = read @ turn.T / size
    return back.flatten(-2)


def _turbo_keys(given: Tensor, bits: int) -> Tensor:
    """Return TurboQuant's keys with corrected norms: each turned and normalized coordinate at its nearest level."""
    x = given.float()
    matrix = sylvester(x.shape[-1], x.device)
    norm = x.norm(dim=-1, keepdim=True)
    levels = gaussian_levels(bits).to(x.device) / math.sqrt(x.shape[-1])
    chosen = levels[
        torch.bucketize((x / (norm + 1e-8) @ matrix).contiguous(), (levels[1:] + levels[:-1]) / 2, right=True)
    ]
    read: Tensor = _half(norm) * (chosen / chosen.norm(dim=-1, keepdim=True)) @ matrix
    return read


def _turbo_values(given: Tensor, bits: int) -> Tensor:
    x = given.float()
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=_TURBO_SCALE)
    codes = ((x - low) / scale + 0.5).trunc().clamp(0, 2**bits - 1)
    read: Tensor = codes * _half(scale) + _half(low)
    return read


@cache
def gaussian_levels(bits: int) -> Tensor:
    """Return the `2^bits` levels that a standard normal number is rounded to with the least squared error, ascending.

    Lloyd's iteration with the means of a normal distribution between two edges, in closed form: each level becomes
    the mean of what is nearest to it (Max 1960). TurboQuant stores turned coordinates so (arXiv 2504.19874).
    """
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    levels = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    ends = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(1000):
        edges = torch.cat((-ends, (levels[1:] + levels[:-1]) / 2, ends))
        density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
        below = normal.cdf(edges.clamp(-40, 40))
        levels = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
    return levels.float()


@cache
def _signs(size: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(_SEED)
    return 2.0 * torch.bernoulli(torch.full((size,), 0.5, device="cpu"), generator=generator) - 1.0


def _nearest(x: Tensor) -> Tensor:
    """Return the nearest integers, halves away from zero."""
    nearest: Tensor = (x.abs() + 0.5).trunc() * x.sign()
    return nearest


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step == 0, 0.0, 1 / step)


_ROUNDINGS: dict[str, Rounding] = {
    "fp8": cast_fp8,
    "nvfp4": _nvfp4,
    "int8_per_token_head": _int8_of_head,
    "fp8_per_token_head": _fp8_of_head,
    "int4_per_token_head": _int4_of_head,
    "q8_0": _q8_0,
    **{f"turboquant_k{bits}": partial(_turbo_keys, bits=bits) for bits in (3, 4)},
    **{f"turboquant_v{bits}": partial(_turbo_values, bits=bits) for bits in (3, 4)},
    **{
        f"q{bits}_{minimum}": partial(_ggml, bits=bits, block=32, has_minimum=bool(minimum))
        for bits in (4, 5)
        for minimum in (0, 1)
    },
}
