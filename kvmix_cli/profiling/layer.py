"""One layer's attention in one sample, as decoding token by token through the cache would go.

A query attends to recent tokens in full precision and to older ones as they are packed. So all that is measured
passes through pairs of a query and a token that was packed by then. (Gradients through all pairs are dominated by near
ones, which are never quantized: on builtin:tiny they overrate layers of local attention a thousandfold.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from kvmix_kernels.layout import Kind
from kvmix_kernels.segments import Packed, Segments
from torch import Tensor

from .choices import Grid, Span

Attend = Callable[[Tensor, Segments, Segments], Tensor]
"""Causal attention: queries `[1, H, S, D]`, which are the last `S` tokens, over keys and values to `[1, H, S, D]`."""
Reading = Callable[[Span], Segments]
"""Keys, or values, as the queries of a span find them."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer's attention in one sample.

    Attributes:
        index: of the layer.
        query: `[1, H, T, D]`.
        states: keys and values as they enter the cache, `[1, H_kv, T, D]` each.
        loss_gradient: of the summed loss with respect to the attention output, `[1, H, T, D]`; None without a loss.
        attend: with the layer's own scaling, soft-cap and sink logits.
        grid: what is packed by when.
    """

    index: int
    query: Tensor
    states: dict[Kind, Tensor]
    loss_gradient: Tensor | None
    attend: Attend
    grid: Grid

    @cached_property
    def spans(self) -> list[Span]:
        """The readers: queries that find packed tokens. The last token's is none of them; it predicts nothing."""
        return self.grid.spans(self.query.shape[2] - 1)

    @property
    def readers(self) -> slice:
        """Positions of all readers."""
        return slice(self.spans[0].start, self.spans[-1].stop)

    @property
    def packed(self) -> slice:
        """Positions of all tokens that any reader finds packed."""
        sink = self.grid.cache.sink
        return slice(sink, sink + self.spans[-1].packed)

    @cached_property
    def output(self) -> Tensor:
        """What the readers get without quantization, `[1, H, S, D]`."""
        return self._read({})

    @cached_property
    def output_gradient(self) -> Tensor:
        """Of the summed loss with respect to `output`."""
        if self.loss_gradient is None:
            raise ValueError("there is no loss: a probe that looks at gradients must say of which labels")
        return self.loss_gradient[:, :, self.readers]

    @cached_property
    def gradients(self) -> dict[Kind, Tensor]:
        """Of the summed loss with respect to packed keys and values, through the readers, `[1, H_kv, P, D]` each."""
        packed = {kind: x[:, :, self.packed].detach().requires_grad_() for kind, x in self.states.items()}
        with torch.enable_grad():
            output = self._read({kind: self._apart(kind, x) for kind, x in packed.items()})
        found = torch.autograd.grad(output, list(packed.values()), self.output_gradient)
        return dict(zip(packed, found, strict=True))

    def quantized_output(self, kind: Kind, packed: Packed) -> Tensor:
        """What the readers get if keys, or values, are packed so: `[1, H, S, D]`."""
        return self._read({kind: self._paged(kind, packed)})

    def _read(self, readings: dict[Kind, Reading]) -> Tensor:
        """Attention of all readers; what no reading is given for is read unquantized."""
        key, value = (readings.get(kind, self._plain(kind)) for kind in self.states)
        outputs = [self.attend(self.query[:, :, s.start : s.stop], key(s), value(s)) for s in self.spans]
        return torch.cat(outputs, dim=2)

    def _plain(self, kind: Kind) -> Reading:
        return lambda span: Segments(None, None, self.states[kind][:, :, : span.stop])

    def _apart(self, kind: Kind, packed: Tensor) -> Reading:
        """Packed tokens unquantized, from a tensor of their own `[1, H_kv, P, D]`."""

        def read(span: Span) -> Segments:
            sink, tail = self._ends(kind, span)
            return Segments(None, None, torch.cat([sink, packed[:, :, : span.packed], tail], dim=2))

        return read

    def _paged(self, kind: Kind, packed: Packed) -> Reading:
        def read(span: Span) -> Segments:
            sink, tail = self._ends(kind, span)
            pages = slice(span.packed // packed.layout.page)
            part = Packed(packed.layout, packed.words[:, :, pages], packed.scales[:, :, pages])
            return Segments(sink if sink.shape[2] else None, part, tail)

        return read

    def _ends(self, kind: Kind, span: Span) -> tuple[Tensor, Tensor]:
        """What a span finds before and after the packed tokens."""
        states, sink = self.states[kind], self.grid.cache.sink
        return states[:, :, :sink], states[:, :, sink + span.packed : span.stop]
