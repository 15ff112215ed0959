"""Changes that storing one layer's keys, or values, at one choice makes, for probes to look at.

A query attends to recent tokens in full precision and to older ones as they are packed. So all that is measured
passes through pairs of a query and a token that was packed by then, as in decoding token by token. (Gradients through
all pairs are dominated by near ones, which are never quantized: on builtin:tiny they overrate layers of local attention
a thousandfold.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from kvmix_kernels.layout import Kind, PageLayout
from kvmix_kernels.pages import Packed
from kvmix_kernels.quantize import dequantize, quantize
from kvmix_kernels.segments import Segments
from torch import Tensor

from ..errors import QuantizationError
from .grid import Grid, Span

Attend = Callable[[Tensor, Segments, Segments], Tensor]
"""Causal attention: queries `[1, H, S, D]`, which are the last `S` tokens, over keys and values to `[1, H, S, D]`."""
Reading = Callable[[Span], Segments]
"""Keys, or values, as the queries of a span find them."""


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """One layer's attention in one sample, as decoding token by token through the cache would go.

    Attributes:
        index: index of the layer.
        query: `[1, H, T, D]`.
        states: keys and values as they enter the cache, `[1, H_kv, T, D]` each.
        loss_gradient: gradient of the summed loss with respect to the attention output, `[1, H, T, D]`; None without
            a loss.
        attend: attention with the layer's own scaling, soft-cap and sink logits.
        grid: settings of the cache, which say what is packed by when.
    """

    index: int
    query: Tensor
    states: dict[Kind, Tensor]
    loss_gradient: Tensor | None
    attend: Attend
    grid: Grid

    @cached_property
    def spans(self) -> list[Span]:
        """Return the readers: queries that find packed tokens. The last token's predicts nothing and is left out."""
        return self.grid.spans(self.query.shape[2] - 1)

    @property
    def readers(self) -> slice:
        """Return the positions of all readers."""
        return slice(self.spans[0].start, self.spans[-1].stop)

    @property
    def packed(self) -> slice:
        """Return the positions of all tokens that any reader finds packed."""
        sink = self.grid.cache.sink
        return slice(sink, sink + self.spans[-1].packed)

    @cached_property
    def output(self) -> Tensor:
        """Return the readers' output without quantization, `[1, H, S, D]`."""
        return self._read({})

    @cached_property
    def output_gradient(self) -> Tensor:
        """Return the gradient of the summed loss with respect to `output`."""
        return self._loss_gradient[:, :, self.readers]

    @property
    def _loss_gradient(self) -> Tensor:
        if self.loss_gradient is None:
            raise ValueError("there is no loss: a probe that looks at gradients must say of which labels")
        return self.loss_gradient

    @cached_property
    def gradients(self) -> dict[Kind, Tensor]:
        """Return the gradients of the summed loss for packed keys and values, through readers, `[1, H_kv, P, D]`.

        They are taken span by span, so that only the scores of one are kept.
        """
        found = {kind: torch.zeros_like(x[:, :, self.packed]) for kind, x in self.states.items()}
        for span in self.spans:
            packed = {
                kind: x[:, :, self.packed][:, :, : span.packed].detach().requires_grad_()
                for kind, x in self.states.items()
            }
            with torch.enable_grad():
                output = self._read_span({kind: self._apart(kind, x) for kind, x in packed.items()}, span)
            gradient = self._loss_gradient[:, :, span.start : span.stop]
            for kind, part in zip(packed, torch.autograd.grad(output, list(packed.values()), gradient), strict=True):
                found[kind][:, :, : span.packed] += part
        return found

    def quantized_output(self, kind: Kind, packed: Packed) -> Tensor:
        """Return the readers' output if keys, or values, are packed so, `[1, H, S, D]`."""
        return self._read({kind: self._paged(kind, packed)})

    def _read(self, readings: dict[Kind, Reading]) -> Tensor:
        """Return the output of all readers; keys or values without a reading are read unquantized."""
        return torch.cat([self._read_span(readings, span) for span in self.spans], dim=2)

    def _read_span(self, readings: dict[Kind, Reading], span: Span) -> Tensor:
        key, value = (readings.get(kind, self._plain(kind)) for kind in self.states)
        return self.attend(self.query[:, :, span.start : span.stop], key(span), value(span))

    def _plain(self, kind: Kind) -> Reading:
        return lambda span: Segments(None, None, self.states[kind][:, :, : span.stop])

    def _apart(self, kind: Kind, packed: Tensor) -> Reading:
        """Return a reading of packed tokens, unquantized, from a tensor of their own with as many as a span finds."""

        def read(span: Span) -> Segments:
            sink, tail = self._ends(kind, span)
            return Segments(None, None, torch.cat([sink, packed, tail], dim=2))

        return read

    def _paged(self, kind: Kind, packed: Packed) -> Reading:
        def read(span: Span) -> Segments:
            sink, tail = self._ends(kind, span)
            pages = slice(span.packed // packed.layout.page)
            part = Packed(packed.layout, packed.words[:, :, pages], packed.scales[:, :, pages])
            return Segments(sink if sink.shape[2] else None, part, tail)

        return read

    def _ends(self, kind: Kind, span: Span) -> tuple[Tensor, Tensor]:
        """Return the tokens that a span finds before and after the packed ones."""
        states, sink = self.states[kind], self.grid.cache.sink
        return states[:, :, :sink], states[:, :, sink + span.packed : span.stop]


@dataclass(frozen=True, eq=False)
class QuantizedStates:
    """One layer's keys, or values, at one choice, by the codec and the attention of the cache itself."""

    layer: LayerAttention
    kind: Kind
    layout: PageLayout

    @cached_property
    def states(self) -> Tensor:
        """Return the keys or values of the tokens that get packed, `[1, H_kv, P, D]`."""
        return self.layer.states[self.kind][:, :, self.layer.packed]

    @cached_property
    def pages(self) -> Packed:
        """Return the packed states. Raises QuantizationError."""
        encoder = self.layer.grid.cache.encoder(self.kind)
        words, scales = quantize(torch.unflatten(self.states, 2, (-1, self.layout.page)), self.layout, encoder)
        if not torch.isfinite(scales).all():
            raise QuantizationError(
                f"layer {self.layer.index} {self.kind}s reach {self.states.abs().max().item():.3g}, "
                f"which {self.layout.scale_dtype} scales cannot hold"
            )
        return Packed(self.layout, words, scales)

    @cached_property
    def error(self) -> Tensor:
        """Return quantized minus unquantized states, `[1, H_kv, P, D]`."""
        pages = dequantize(self.pages.words, self.pages.scales, self.layout, self.states.dtype)
        return pages.flatten(2, 3) - self.states

    @cached_property
    def output_change(self) -> Tensor:
        """Return quantized minus unquantized attention output of the readers, `[1, H, S, D]`."""
        return self.layer.quantized_output(self.kind, self.pages) - self.layer.output


@dataclass(frozen=True, eq=False)
class Change:
    """The view that a probe has of one choice: all KV heads, or after `head` one of them with its query heads.

    Everything is computed when it is first looked at, and once for all probes. `P` are the packed tokens, `S` the
    readers: the queries that find them packed. Gradients are of the loss summed over the tokens of the sample.
    """

    stored: QuantizedStates
    only: int | None = None

    def head(self, index: int) -> Change:
        """Return the part of one KV head."""
        return replace(self, only=index)

    @property
    def readers(self) -> int:
        """Return the number of predictions that read something packed, over which a mean loss is taken."""
        spans = self.stored.layer.spans
        return spans[-1].stop - spans[0].start

    @property
    def states(self) -> Tensor:
        """Return unquantized keys or values, `[1, H_kv, P, D]`."""
        return self._of_heads(self.stored.states)

    @property
    def error(self) -> Tensor:
        """Return quantized minus unquantized keys or values, `[1, H_kv, P, D]`."""
        return self._of_heads(self.stored.error)

    @property
    def gradient(self) -> Tensor:
        """Return the gradient of the loss with respect to `states`, through the readers, `[1, H_kv, P, D]`."""
        return self._of_heads(self.stored.layer.gradients[self.stored.kind])

    @property
    def output(self) -> Tensor:
        """Return the unquantized attention output of the readers, `[1, H, S, D]`."""
        return self._of_heads(self.stored.layer.output)

    @property
    def output_change(self) -> Tensor:
        """Return quantized minus unquantized attention output, `[1, H, S, D]`."""
        return self._of_heads(self.stored.output_change)

    @property
    def output_gradient(self) -> Tensor:
        """Return the gradient of the loss with respect to `output`, `[1, H, S, D]`."""
        return self._of_heads(self.stored.layer.output_gradient)

    def _of_heads(self, whole: Tensor) -> Tensor:
        """Return the heads that this is about from `[1, heads, ...]`, which are KV heads or query heads."""
        if self.only is None:
            return whole
        return whole.tensor_split(self.stored.states.shape[1], dim=1)[self.only]
