"""Windows: rules for how many recent tokens stay in full precision.

The tail holds the tokens that have arrived and are neither sinks nor packed yet. A window says how many of them to
keep. Whenever the tail holds that many and at least one whole page more, the oldest whole pages of the rest are packed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ..errors import KvmixError
from .document.fields import MOST_TOKENS, WIDTHS
from .document.strict_yaml import StrictModel

PAPER_RATIO = {1: 0.1, 2: 0.1, 3: 0.2, 4: 0.2, 8: 0.2}
"""Shares of the tail kept at each width (KVmix, section 3.4: 20 % at 3-4 bits, 10 % at 2)."""


class _Window(StrictModel):
    def keep(self, tail: int, bits: int) -> int:
        """Return how many of a tail of `tail` tokens stay in full precision, in a layer of `bits`."""
        raise NotImplementedError

    @property
    def short(self) -> str:
        """Return the window as it is written on the command line; `parse_window` reads it."""
        raise NotImplementedError

    def due(self, tail: int, bits: int, page: int) -> int:
        """Return how many of a tail of `tail` tokens must be packed now: whole pages, the oldest tokens first."""
        return max(0, tail - self.keep(tail, bits)) // page * page


class Recent(_Window):
    """A window of the last `tokens` tokens (KIVI's residual, StreamingLLM's window)."""

    kind: Literal["recent"] = "recent"
    tokens: int = Field(default=128, ge=0, le=MOST_TOKENS)

    def keep(self, tail: int, bits: int) -> int:
        return self.tokens

    @property
    def short(self) -> str:
        return f"recent:{self.tokens}"


class Rpc(_Window):
    """KVmix's recent pivotal context: a share of the current tail by width, `floor(ratio * tail)` tokens.

    The tail shrinks at each step, so this collapses geometrically to a short window; it is not a share of the
    context (KVmix, section 3.4, as released).
    """

    kind: Literal["rpc"] = "rpc"
    ratio: dict[int, float] = Field(default_factory=lambda: dict(PAPER_RATIO))

    @field_validator("ratio")
    @classmethod
    def _shares(cls, ratio: dict[int, float]) -> dict[int, float]:
        if any(not 0 <= share < 1 for share in ratio.values()):
            raise ValueError("ratios must be at least 0 and less than 1")
        if unknown := [bits for bits in ratio if bits not in WIDTHS]:
            raise ValueError(f"ratios are given by width, one of {', '.join(map(str, WIDTHS))}, got {unknown[0]}")
        return dict(sorted({**PAPER_RATIO, **{bits: share + 0.0 for bits, share in ratio.items()}}.items()))

    def keep(self, tail: int, bits: int) -> int:
        return int(self.ratio[min(bits, max(self.ratio))] * tail)

    @property
    def short(self) -> str:
        return "rpc"


class NoWindow(_Window):
    """No window: only the page that is filling up is in full precision."""

    kind: Literal["none"] = "none"

    def keep(self, tail: int, bits: int) -> int:
        return 0

    @property
    def short(self) -> str:
        return "none"


Window = Annotated[Recent | Rpc | NoWindow, Field(discriminator="kind")]


def parse_window(text: str) -> Recent | Rpc | NoWindow:
    """Return the window that `recent:128`, `rpc` or `none` stands for. Raises KvmixError for another text."""
    kind, _, argument = text.partition(":")
    if kind == "recent" and not argument:
        return Recent()
    if kind == "recent" and argument.isdecimal():
        if len(argument) > len(str(MOST_TOKENS)) or int(argument) > MOST_TOKENS:
            raise KvmixError(f"window '{text}' is too long: use at most recent:{MOST_TOKENS}")
        return Recent(tokens=int(argument))
    if text == "rpc":
        return Rpc()
    if text == "none":
        return NoWindow()
    raise KvmixError(f"unknown window '{text}': use recent:TOKENS, rpc or none")
