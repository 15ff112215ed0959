"""What storing one layer's keys, or values, at one choice changes, for probes to look at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from kvmix_kernels.layout import Kind, PageLayout
from kvmix_kernels.quantize import dequantize, quantize
from kvmix_kernels.segments import Packed
from torch import Tensor

from ..errors import QuantizationError
from .layer import Layer


@dataclass(frozen=True, eq=False)
class Stored:
    """One layer's keys, or values, at one choice, by the codec and the attention of the cache itself."""

    layer: Layer
    kind: Kind
    layout: PageLayout

    @cached_property
    def states(self) -> Tensor:
        """Keys or values of the tokens that get packed, `[1, H_kv, P, D]`."""
        return self.layer.states[self.kind][:, :, self.layer.packed]

    @cached_property
    def pages(self) -> Packed:
        """The same, packed. Raises QuantizationError."""
        words, scales = quantize(self.states.unflatten(2, (-1, self.layout.page)), self.layout)
        if not torch.isfinite(scales).all():
            raise QuantizationError(
                f"layer {self.layer.index} {self.kind}s reach {self.states.abs().max().item():.3g}, "
                f"which {self.layout.scale_dtype} scales cannot hold"
            )
        return Packed(self.layout, words, scales)

    @cached_property
    def error(self) -> Tensor:
        """Quantized minus unquantized, `[1, H_kv, P, D]`."""
        pages = dequantize(self.pages.words, self.pages.scales, self.layout, self.states.dtype)
        return pages.flatten(2, 3) - self.states

    @cached_property
    def output_change(self) -> Tensor:
        """Quantized minus unquantized attention output of the readers, `[1, H, S, D]`."""
        return self.layer.quantized_output(self.kind, self.pages) - self.layer.output


@dataclass(frozen=True, eq=False)
class Change:
    """What a probe sees of a choice: all KV heads, or after `head` one of them with the query heads that read it.

    Everything is worked out when it is first looked at, and once for all probes. `P` are the packed tokens, `S` the
    readers: the queries that find them packed. Gradients are of the loss summed over the tokens of the sample.
    """

    stored: Stored
    only: int | None = None

    def head(self, index: int) -> Change:
        """The part of one KV head."""
        return replace(self, only=index)

    @property
    def readers(self) -> int:
        """Predictions that read something packed: what a mean loss is a mean over."""
        readers = self.stored.layer.readers
        return readers.stop - readers.start

    @property
    def states(self) -> Tensor:
        """Unquantized keys or values, `[1, H_kv, P, D]`."""
        return self._of_heads(self.stored.states)

    @property
    def error(self) -> Tensor:
        """Quantized minus unquantized keys or values, `[1, H_kv, P, D]`."""
        return self._of_heads(self.stored.error)

    @property
    def gradient(self) -> Tensor:
        """Of the loss with respect to `states`, through the readers, `[1, H_kv, P, D]`."""
        return self._of_heads(self.stored.layer.gradients[self.stored.kind])

    @property
    def output(self) -> Tensor:
        """Unquantized attention output of the readers, `[1, H, S, D]`."""
        return self._of_heads(self.stored.layer.output)

    @property
    def output_change(self) -> Tensor:
        """Quantized minus unquantized attention output, `[1, H, S, D]`."""
        return self._of_heads(self.stored.output_change)

    @property
    def output_gradient(self) -> Tensor:
        """Of the loss with respect to `output`, `[1, H, S, D]`."""
        return self._of_heads(self.stored.layer.output_gradient)

    def _of_heads(self, whole: Tensor) -> Tensor:
        """Of `[1, heads, ...]`, KV heads or query heads, those that this is about."""
        if self.only is None:
            return whole
        kv_heads = self.stored.states.shape[1]
        return whole.unflatten(1, (kv_heads, -1))[:, self.only]
