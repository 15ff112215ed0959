"""Which recent tokens stay in full precision. Each window answers one question: of a tail of `n`, how many to keep?

The tail is what has arrived and is neither a sink nor packed yet. Whenever it holds `keep` tokens and at least one
whole page more, the oldest whole pages of the rest are packed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..errors import KvmixError

PAPER_RATIO = {1: 0.1, 2: 0.1, 3: 0.2, 4: 0.2, 8: 0.2}
"""Shares of the tail kept at each width (KVmix, section 3.4: 20 % at 3-4 bits, 10 % at 2)."""


class _Window(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def keep(self, tail: int, bits: int) -> int:
        """Tokens of a tail of `tail` that stay in full precision."""
        raise NotImplementedError

    @property
    def short(self) -> str:
        """As on the command line; `parse_window` reads it."""
        raise NotImplementedError

    def due(self, tail: int, bits: int, page: int) -> int:
        """Tokens of a tail of `tail` that must be packed now: whole pages, oldest first."""
        return max(0, tail - self.keep(tail, bits)) // page * page


class Recent(_Window):
    """The last `tokens` tokens (KIVI's residual, StreamingLLM's window)."""

    kind: Literal["recent"] = "recent"
    tokens: int = Field(default=128, ge=0)

    def keep(self, tail: int, bits: int) -> int:
        return self.tokens

    @property
    def short(self) -> str:
        return f"recent:{self.tokens}"


class Rpc(_Window):
    """KVmix's recent pivotal context: a share of the *current tail*, by bit width, `floor(ratio * tail)`.

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
        return {**PAPER_RATIO, **ratio}

    def keep(self, tail: int, bits: int) -> int:
        return int(self.ratio[min(bits, max(self.ratio))] * tail)

    @property
    def short(self) -> str:
        return "rpc"


class NoWindow(_Window):
    """Nothing but the page that is filling up."""

    kind: Literal["none"] = "none"

    def keep(self, tail: int, bits: int) -> int:
        return 0

    @property
    def short(self) -> str:
        return "none"


Window = Annotated[Recent | Rpc | NoWindow, Field(discriminator="kind")]


def parse_window(text: str) -> Recent | Rpc | NoWindow:
    """`recent:128`, `rpc` or `none`, as on the command line. Raises KvmixError."""
    kind, _, argument = text.partition(":")
    if kind == "recent" and (not argument or argument.isdecimal()):
        return Recent(tokens=int(argument)) if argument else Recent()
    if text == "rpc":
        return Rpc()
    if text == "none":
        return NoWindow()
    raise KvmixError(f"unknown window '{text}': use recent:TOKENS, rpc or none")
