"""Channels scaled so that none is much larger than the others."""

from __future__ import annotations

from kvmix_kernels.layout import Kind
from torch import Tensor

from ...errors import PolicyError
from .base import Transform, for_query_heads, wide_dtype

LIMIT = 256.0
"""A channel is scaled by no more than this, up or down. What was small in the prompt may not be so later: beyond it
numbers of ordinary size would leave the range of float16."""


class Balancing(Transform):
    """`k b` is stored and `q / b` asked, channel by channel; of values `v / c`, and the output is taken times `c`.

    Keys, MiKV (arXiv 2402.18096, section 3.2): `b = sqrt(max |q| / max |k|)` over the prompt, for each layer, head and
    channel. With grouped queries the maximum is also over the query heads of a group, of which the paper does not
    speak. MiKV balances only the tokens it stores in few bits; here that is all of them.

    Values, ZipCache (arXiv 2405.14256, channel-separable tokenwise quantization): `c = sqrt(max |v|)`. Its code
    (`true_channel_tokenwise_quantize`) takes the maximum over the batch and anew whenever it compresses; ours is over
    the prompt, for every sequence its own, and stays.

    Where a maximum is 0, NaN or Inf, the scale is 1. See `LIMIT`.

    Args:
        kind: of what.
        name: for errors, e.g. `layer 3 keys`.
    """

    def __init__(self, kind: Kind, name: str) -> None:
        self.needs_queries = kind == "key"
        self._name = name

    def fit(self, states: Tensor, query: Tensor | None) -> None:
        """Raises PolicyError if there are no queries for keys."""
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
        return (states * self._scale).to(states.dtype)

    def restore(self, stored: Tensor) -> Tensor:
        return (stored / self._scale).to(stored.dtype)

    def query(self, query: Tensor) -> Tensor:
        return self._undone(query)

    def output(self, output: Tensor) -> Tensor:
        return self._undone(output)

    def _undone(self, given: Tensor) -> Tensor:
        return (given / for_query_heads(self._scale, given.shape[1])).to(given.dtype)

    @property
    def _scale(self) -> Tensor:
        """`[B, H_kv, 1, D]`."""
        if self._state is None:
            raise RuntimeError("balancing has seen no prompt yet")
        return self._state


def _largest(states: Tensor, kv_heads: int) -> Tensor:
    """The largest magnitude of each channel, over tokens and the heads of a group: `[B, H_kv, 1, D]`."""
    low, high = states.detach().aminmax(dim=2, keepdim=True)
    largest = high.maximum(-low).to(wide_dtype(states.dtype))
    return largest.unflatten(1, (kv_heads, -1)).amax(dim=2)
