"""The settings of sampling, and their ranges. Loads no torch, so that a command checks them before it does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import KvmixError

LEAST_TEMPERATURE = 1e-6
"""Scores divided by much less overflow float32; at this one the most likely token is taken all the same."""


@dataclass(frozen=True)
class Sampling:
    """Settings of how the next token is drawn.

    Attributes:
        temperature: 0 is greedy; otherwise at least `LEAST_TEMPERATURE`.
        top_p: share of the probability to sample from, in (0, 1].

    Raises:
        KvmixError: if a setting is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise KvmixError(
                f"--temperature must be 0 (greedy) or a number from {LEAST_TEMPERATURE} up, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise KvmixError(f"--top-p must be more than 0 and at most 1, got {self.top_p}")

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of transformers' `generate`; none if the most likely token is taken."""
        if not self.temperature:
            return {}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
