"""Scores of a prompt that one layer holds unpacked until it has them.

They come from outside of the layer (`decoding/prompt_scores.py`): the prompt is read again against itself, or a press
of kvpress scores it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..buffer import lasting
from ..observation import AttentionCall, QuerySample, weight_rows


@dataclass
class PromptScores:
    """The scores of a prompt, and the part of it that is being read again.

    Attributes:
        scores: `[B, H_kv, T]` float32.
        sinks: first tokens, which all parts are read together with.
        part: tokens that are being read again; None if none are.
    """

    scores: Tensor
    sinks: int
    part: slice | None = None
    _keys: Tensor | None = None  # [B, H_kv, n, D]: of sinks, part, and what the queries belong to

    @classmethod
    @lasting
    def empty(cls, keys: Tensor, sinks: int) -> PromptScores:
        """Return no scores of a prompt with keys `[B, H_kv, T, D]`."""
        return cls(torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device), min(sinks, keys.shape[2]))

    def read(self, prompt: Tensor, new: Tensor) -> Tensor:
        """Return keys `[B, H_kv, T, D]` of the prompt followed by new ones, which read a part of it."""
        if self.part is None:
            raise AssertionError("no part is being read")
        before = min(self.sinks, self.part.start)
        self._keys = torch.cat([prompt[:, :, :before], prompt[:, :, self.part], new], dim=2)
        return torch.cat([prompt, new], dim=2)

    @lasting
    def learn(self, call: AttentionCall) -> None:
        """Raise the scores of the part to the largest weight that a query of a call gives to each token.

        Weights are over sinks, the part and the queries' own tokens only (KVzip, arXiv 2505.23416, section 3.3).
        """
        if self._keys is None or self.part is None:
            raise AssertionError("no part is being read")
        keys, self._keys = self._keys, None
        tokens, queries, before = keys.shape[2], call.query.shape[2], min(self.sinks, self.part.start)
        mask = call.mask
        if mask is not None and mask.shape[3] > 1:
            prompt = mask.shape[3] - queries
            mask = torch.cat([mask[..., :before], mask[..., :prompt][..., self.part], mask[..., prompt:]], dim=3)
        rows = weight_rows(
            replace(call, mask=mask, logarithms=None), keys, tokens, True, QuerySample(every=True), reduce="max"
        )
        found = rows.weights.amax(2)[..., before : tokens - queries]
        self.scores[..., self.part] = torch.maximum(self.scores[..., self.part], found)

    @lasting
    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to the scores."""
        self.scores = change(self.scores)
