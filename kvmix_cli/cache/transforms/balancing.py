"""Balancing: channels are scaled so that none is much larger than the others."""

from __future__ import annotations

from kvmix_kernels.layout import Kind
from torch import Tensor

from ...errors import PolicyError
from .base import Transform, for_query_heads, wide_dtype

LIMIT = 256.0
"""A channel is scaled by no more than this, up or down. What was small in the prompt may not be so later: beyond it
numbers of ordinary size would leave the range of float16."""


class Balancing(Transform):
    """A scale for each channel: `k b` is stored and `q / b` meets it; of values `v / c`, and the output is times `c`.

    Keys, MiKV (arXiv 2402.18096, section 3.2): `b = sqrt(max |q| / max |k|)` over the prompt, for each layer, head and
    channel. With grouped queries the maximum is also over the query heads of a group, a case the paper leaves open.
    MiKV balances only the tokens it stores in few bits; here that is all of them.

    Values, ZipCache (arXiv 2405.14256, channel-separable tokenwise quantization): `c = sqrt(max |v|)`. Its code
    (`true_channel_tokenwise_quantize`) takes the maximum over the batch, again at every compression; ours is
    taken once, over the prompt of each sequence.

    Where a maximum is 0, NaN or Inf, the scale is 1. See `LIMIT`.

    Args:
        kind: `key` or `value`.
        name: of the tensor, for errors, e.g. `layer 3 keys`.
    """

    def __init__(self, kind: Kind, name: str) -> None:
        self.needs_queries = kind == "key"
        self._name = name

    def fit(self, states: Tensor, query: Tensor | None) -> None:
        """Take the scales from the prompt. Raises PolicyError if there are no queries for keys."""
        if not self.needs_queries:
            scale = 1 / _largest(states, states.shape[1]).sqrt()
        elif query is None:
            raise PolicyError(
                f"{self._name} cannot be balanced: this model's attention does not show kvmix its queries; "
                "take `balance` out of the plan's transforms"
            )
        else:
            scale = _largest(query, states.shape[1]).sqrt() / _largest(states, states.shape[1]).sqrt()
        usable = scale.isfinite() & (scale > 0)
        self._state = scale.clamp(1 / LIMIT, LIMIT).where(usable, 1.0)

    def store(self, states: Tensor) -> Tensor:
        """Return the states with every channel scaled."""
        return (states * self._scale).to(states.dtype)

    def restore(self, stored: Tensor) -> Tensor:
        """Return the inverse of `store`."""
        return (stored / self._scale).to(stored.dtype)

    def query(self, query: Tensor) -> Tensor:
        """Return the queries divided by the scales of the keys."""
        return self._undone(query)

    def output(self, output: Tensor) -> Tensor:
        """Return the output divided by the scales of the values."""
        return self._undone(output)

    def _undone(self, given: Tensor) -> Tensor:
        return (given / for_query_heads(self._scale, given.shape[1])).to(given.dtype)

    @property
    def _scale(self) -> Tensor:
        """Return the scales `[B, H_kv, 1, D]`."""
        if self._state is None:
            raise RuntimeError("balancing has seen no prompt yet")
        return self._state


def _largest(states: Tensor, kv_heads: int) -> Tensor:
    """Return each channel's largest magnitude, over tokens and the heads of a group: `[B, H_kv, 1, D]`."""
    low, high = states.detach().aminmax(dim=2, keepdim=True)
    largest = high.maximum(-low).to(wide_dtype(states.dtype))
    grouped: Tensor = largest.unflatten(1, (kv_heads, -1))
    return grouped.amax(dim=2)
