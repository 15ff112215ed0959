"""The unquantized cache's predictions of the sample in hand, and the divergence of other predictions from them.

Logits of a whole text have no bound: 8K tokens of a vocabulary of 49,152 take 1.6 GB. So the unquantized cache reads
the sample alongside the others, and only the logits of the newest part are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..cache.subject import AttendedPairs, Subject, attended
from ..decoding.feed import feed, prefill
from ..errors import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

    from ..models.loading import LoadedModel

LARGEST = 80.0
"""Nats by which a logit may rise before the rise is cut: its exponential is still a float32."""


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(reference || logits) in nats of each of two tensors of logits `[tokens, vocabulary]`, as `[tokens]`.

    With d the change of the logits, less its mean under p, it is log E_p[exp(d)] = log(1 + E_p[exp(d) - 1 - d]). No
    term is negative, so that divergences far below the rounding of float32 log-probabilities keep their digits.
    """
    p = reference.softmax(-1)
    change = (logits - reference).masked_fill_(p == 0, 0.0)
    change -= (p * change).sum(-1, keepdim=True)
    change.clamp_(max=LARGEST)
    return (p * (change.expm1() - change)).sum(-1).log1p()


class UnquantizedReading:
    """One sample read through the unquantized cache, part by part, for all rows that are measured side by side.

    A part is read once, when the first row asks for it; the cache is freed after the last one.

    Attributes:
        has_failed: it could not be read to its end.
        attended: what was read so far.
    """

    def __init__(self, loaded: LoadedModel, ids: Sequence[int], prefix: int, step: int) -> None:
        self.loaded, self.ids, self.prefix, self.step = loaded, ids, prefix, step
        self.has_failed = False
        self.attended: AttendedPairs = {"total": 0, "quantized": 0}
        self._cache: Cache | None = None
        self._parts: Iterator[tuple[slice, Tensor]] = iter(())
        self._end = 0
        self._logits: Tensor | None = None

    def is_of(self, loaded: LoadedModel, ids: Sequence[int], prefix: int, step: int) -> bool:
        """Return whether this is a reading of these tokens in these steps."""
        return self.loaded is loaded and (self.ids, self.prefix, self.step) == (ids, prefix, step)

    def parts(self) -> Iterator[slice]:
        """Yield the parts of the tokens after the prefix whose next token is predicted."""
        scored = len(self.ids) - self.prefix - 1
        for start in range(0, scored, self.step):
            yield slice(start, min(start + self.step, scored))

    def logits(self, part: slice) -> Tensor | None:
        """Return the float32 logits `[tokens, vocabulary]` of a part of the tokens after the prefix.

        Rows ask for the newest part, the next one, or the first, which begins anew. None once memory was out, so that
        the other rows go on without.
        """
        if self.has_failed:
            return None
        try:
            return self.read(part)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def read(self, part: slice) -> Tensor:
        """Return what `logits` returns, or raise what reading raises."""
        if self._logits is None or part.stop != self._end:
            try:
                self._logits = self._read(part)
            except BaseException:
                self.has_failed, self._logits, self._cache, self._parts = True, None, None, iter(())
                raise
        return self._logits

    def _read(self, part: slice) -> Tensor:
        if part.start == 0:
            self._cache = Subject().cache(self.loaded.config, reserve=len(self.ids))
            prefill(self.loaded, self._cache, self.ids[: self.prefix])
            self._parts = feed(self.loaded, self._cache, self.ids[self.prefix : -1], self.step)
        assert self._cache is not None, f"part {part} was asked for out of its turn"
        read, logits = next(self._parts)
        assert read == part, f"part {part} was asked for, and {read} is the next"
        self._end, self.attended = part.stop, attended(self._cache)
        if part.stop == len(self.ids) - self.prefix - 1:
            self._cache, self._parts = None, iter(())
        return logits
