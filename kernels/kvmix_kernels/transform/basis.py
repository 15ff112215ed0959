"""The directions of one layer's keys or values, as tensors, and the frames that keys are turned to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..transform_layout import STEPS, TransformLayout


def rotate(states: Tensor, angles: Tensor, start: int = 0, interleaved: bool = False) -> Tensor:
    """Turn pairs of channels as RoPE does; arithmetic is in the dtype of `states`.

    Args:
        states: `[..., D]`.
        angles: in radians, `[..., n]` float64: of each pair, broadcast over all other axes.
        start: first channel that is turned; those before it and after `2 n` are returned as they are.
        interleaved: pairs are channels `(2 i, 2 i + 1)` (GPT-J), otherwise `(i, i + n)` (Llama).
    """
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    stop = start + 2 * angles.shape[-1]
    part = states[..., start:stop]
    a, b = (part[..., 0::2], part[..., 1::2]) if interleaved else part.chunk(2, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([states[..., :start], turned, states[..., stop:]], dim=-1)


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames of consecutive tokens: a key is stored relative to the start of its frame.

    After RoPE, means and covariances of keys depend on their position; within a frame they are those of the first
    positions, at any context. A key `k` of a frame that starts at position `p` is stored as `R(-p) k` and met by the
    query `R(-p) q`. `R` is orthogonal, so `q . k` stays, whatever the frequencies.

    Attributes:
        length: tokens of a frame, whole pages, counted after the sinks; None for one frame without end. Frame `f`
            starts at position `f * length`, so that the first is not turned.
        frequencies: `[n]` float64, radians that RoPE turns each pair of channels by, per position; empty for none.
        start: first channel that RoPE turns.
        interleaved: RoPE pairs channels `(2 i, 2 i + 1)` (GPT-J), otherwise `(i, i + n)` (Llama).
    """

    length: int | None
    frequencies: Tensor
    start: int = 0
    interleaved: bool = False

    @property
    def turns(self) -> bool:
        """Return whether keys and queries are turned at all."""
        return self.length is not None and self.frequencies.numel() > 0

    def of_pages(self, first_page: int, pages: int, page: int) -> Tensor:
        """Return the frame of each of some pages of `page` tokens, `[pages]` int64."""
        index = torch.arange(first_page, first_page + pages, device=self.frequencies.device)
        return torch.zeros_like(index) if self.length is None else index * page // self.length

    def count(self, pages: int, page: int) -> int:
        """Return the number of frames that `pages` pages of `page` tokens fall in."""
        return 1 if self.length is None else -(-pages * page // self.length)

    def turn(self, states: Tensor, frames: Tensor, back: bool = False) -> Tensor:
        """Return states `[..., n, T, D]` turned to the starts of their frames `[n]`; `back` is the inverse.

        Arithmetic is in the dtype of `states`; angles are computed in float64.
        """
        if not self.turns or self.length is None:
            return states
        angles = (frames * self.length)[:, None, None].double() * self.frequencies * (1 if back else -1)
        return rotate(states, angles, self.start, self.interleaved)


class _Arrays(NamedTuple):
    """Tensors of a basis as the native library reads them: contiguous, all but the first two in float32.

    Attributes:
        widths: `[H_kv, D]` uint8.
        places: `[H_kv]` int64, first byte of each head in a page.
        mean, deviation, steps: `[H_kv, D]`.
        encoder: `[H_kv, D, D]`, transposed: a row for each channel.
    """

    widths: Tensor
    places: Tensor
    mean: Tensor
    encoder: Tensor
    deviation: Tensor
    steps: Tensor


@dataclass(frozen=True, eq=False)
class TransformBasis:
    """The directions of one layer's keys or values: `z = encode (y - mean)`, `y = mean + decode z`.

    Half the squared error of `z` is the expected increase of the loss in nats a token, see docs/transform-coding.md.

    Attributes:
        layout: widths of the directions, and pages.
        encoder, decoder: `[H_kv, D, D]`.
        mean: `[H_kv, D]`.
        deviation: `[H_kv, D]`, standard deviation of each direction, falling.
        frames: of keys; None for values.
    """

    layout: TransformLayout
    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    deviation: Tensor
    frames: Frames | None = None

    @cached_property
    def widths(self) -> Tensor:
        """Return the width of each direction, `[H_kv, D]` int64."""
        return torch.tensor(self.layout.direction_widths, device=self.mean.device)

    @cached_property
    def levels(self) -> Tensor:
        """Return the number of codes of each direction, `[H_kv, D]`; 1 for a direction of 0 bits."""
        return (2.0**self.widths).to(self.mean.dtype)

    @cached_property
    def steps(self) -> Tensor:
        """Return the step of each direction's quantizer, in units of `z`: `[H_kv, D]`; 0 for 0 bits."""
        unit = torch.tensor([0.0, *STEPS.values()], dtype=self.mean.dtype, device=self.mean.device)
        return unit[self.widths] * self.deviation

    @cached_property
    def arrays(self) -> _Arrays:
        """Return what the native library reads."""
        floats = (self.mean, self.encoder.transpose(-1, -2), self.deviation, self.steps)
        mean, encoder, deviation, steps = (each.float().contiguous() for each in floats)
        widths, places = self.widths.to(torch.uint8).contiguous(), torch.tensor(self.layout.head_offsets)
        return _Arrays(widths, places, mean, encoder, deviation, steps)

    @cached_property
    def decoding(self) -> Tensor:
        """Return the decoder with steps folded in, `[H_kv, D, D]`: `y = mean + decoding (code - level / 2 + 1/2)`."""
        return self.decoder * self.steps[:, None, :]

    def frames_of(self, first_page: int, pages: int) -> Tensor | None:
        """Return the frame of each page, `[pages]`; None where nothing is turned."""
        if self.frames is None or not self.frames.turns:
            return None
        return self.frames.of_pages(first_page, pages, self.layout.page)
