"""Centering: keys and values are stored without the mean of each channel."""

from __future__ import annotations

from kvmix_kernels.layout import Kind
from torch import Tensor

from ...errors import PlanError
from .arrays import FileTensor
from .base import Transform, for_query_heads, wide_dtype


class Centering(Transform):
    """A mean for each channel: `k - m` is stored, and each score of a query `q` falls by `q . m`; softmax cancels it.

    Of values, `v - m` is stored, and `m` is added to the output, as attention weights add up to 1.

    For keys this is the smoothing of SageAttention (arXiv 2410.02367, `smooth_k`), which takes the mean of all keys
    again in every call; a cache must have it before the next token, so ours is that of the first prompt, or of a
    calibration text, and does not change. TaDA (arXiv 2506.04642) centers too, but stores the mean over *heads* for
    every token, so its bytes grow with the tokens. Centering values over tokens is ours.

    Args:
        kind: `key` or `value`.
        means: `[H_kv, D]` known beforehand; None to take those of the prompt, separately for every sequence.
        origin: the file of the means, for errors.
    """

    def __init__(self, kind: Kind, means: Tensor | None = None, origin: FileTensor | None = None) -> None:
        self.shifts_scores = kind == "key"
        self.shifts_output = kind == "value"
        self._means = None if means is None else means[None, :, None]
        self._origin = origin

    @property
    def constant(self) -> Tensor | None:
        """Return the means that were known beforehand."""
        return self._means

    def fit(self, states: Tensor, query: Tensor | None) -> None:
        """Take the mean of the prompt's tokens, padding included; 0 where it is NaN or Inf.

        Raises:
            PlanError: if the means that were given have another number of heads.
        """
        if self._means is None:
            mean = states.detach().mean(dim=2, keepdim=True, dtype=wide_dtype(states.dtype))
            self._state = mean.nan_to_num(0, 0, 0)
        elif self._means.shape[1] != states.shape[1]:
            raise PlanError(
                f"{self._origin} has {self._means.shape[1]} KV heads and the model {states.shape[1]}; "
                "make it for this model, as docs/transforms.md says"
            )

    def store(self, states: Tensor) -> Tensor:
        """Return the states without the means."""
        return (states - self._mean).to(states.dtype)

    def restore(self, stored: Tensor) -> Tensor:
        """Return the inverse of `store`."""
        return (stored + self._mean).to(stored.dtype)

    def query(self, query: Tensor) -> Tensor:
        """Return the queries as they are: softmax cancels the change of their scores."""
        return query

    def output(self, output: Tensor) -> Tensor:
        """Return the output plus the means of the values."""
        return (output + for_query_heads(self._mean, output.shape[1])).to(output.dtype)

    @property
    def _mean(self) -> Tensor:
        """Return the means `[B or 1, H_kv, 1, D]`."""
        mean = self._state if self._means is None else self._means
        if mean is None:
            raise RuntimeError("centering has seen no prompt yet")
        return mean
