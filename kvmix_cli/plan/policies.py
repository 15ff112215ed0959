"""What a plan can do besides choosing widths: transform the data, sort tokens, sort key channels. Settings, no torch.

    transforms  what happens to keys and values before they are stored; attention takes it back
    tokens      important tokens get wider tiers than their layer's bits, unimportant ones may be evicted
    channels    important key channels get wider runs than their layer's bits

A layer's own bits hold for whatever no tier and no run claims, so every axis combines with every plan.
`cache/transforms`, `cache/policies` and `cache/packing` do what is written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

from kvmix_kernels.layout import BITS, FULL_PRECISION_BITS, WORD_BITS
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

WIDTHS = (*BITS, FULL_PRECISION_BITS)
MOST_CHANNELS = 256
"""An order of channels is stored as uint8."""


def _from_list(value: object) -> object:
    """Files have lists."""
    return tuple(value) if isinstance(value, list) else value


T = TypeVar("T")
Several = Annotated[tuple[T, ...], BeforeValidator(_from_list)]


class _Setting(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What files say: the kind of a transform, and everything that is not as it is by default."""
        usual = {name: field.default for name, field in type(self).model_fields.items() if name != "kind"}
        return {name: value for name, value in write(self).items() if getattr(self, name) != usual.get(name, ...)}


class Rotate(_Setting):
    """An orthogonal matrix over the channels: a Hadamard matrix with random signs, or one from a file.

    Attributes:
        seed: of the signs.
        matrix: a safetensors file with `rotation` `[D, D]`, or `layers.N.k` and `layers.N.v` for each layer.
    """

    kind: Literal["rotate"] = "rotate"
    seed: int = Field(default=0, ge=0)
    matrix: str | None = None


class Center(_Setting):
    """The mean of every channel taken out: that of the prompt, or one from a file.

    Attributes:
        means: a safetensors file with `layers.N.k` and `layers.N.v`, each `[H_kv, D]`.
    """

    kind: Literal["center"] = "center"
    means: str | None = None


class Balance(_Setting):
    """Every channel scaled, by what the prompt says: keys by `sqrt(max|q| / max|k|)`, values by `1 / sqrt(max|v|)`."""

    kind: Literal["balance"] = "balance"


Transform = Annotated[Rotate | Center | Balance, Field(discriminator="kind")]


class Transforms(_Setting):
    """Of keys and of values, in the order in which they are applied."""

    k: Several[Transform] = ()
    v: Several[Transform] = ()

    def then(self, more: Transforms) -> Transforms:
        """These, and others after them. Raises ValueError if both do the same to keys, or to values."""
        for what, first, second in (("keys", self.k, more.k), ("values", self.v, more.v)):
            if twice := {each.kind for each in first} & {each.kind for each in second}:
                raise ValueError(f"both {sorted(twice)[0]} {what}")
        return Transforms(k=self.k + more.k, v=self.v + more.v)

    @property
    def kept(self) -> int:
        """Transforms that keep a number of every channel for every sequence; matrices and files are shared by all."""
        own = [isinstance(each, Balance) or (isinstance(each, Center) and not each.means) for each in self.k + self.v]
        return sum(own)


def known_width(bits: int) -> int:
    if bits not in WIDTHS:
        raise ValueError(f"must be one of {', '.join(map(str, WIDTHS))}, got {bits}")
    return bits


class Tier(_Setting):
    """A share of the tokens, and the bits of their keys and values (those of the layer where they are more)."""

    share: float = Field(gt=0, lt=1)
    k: int
    v: int

    _widths = field_validator("k", "v")(known_width)


class TokenPolicy(_Setting):
    """Tokens that leave the window are sorted by importance, `flush` at a time, once.

    Attributes:
        score: what importance is; a name of `cache/policies`.
        tiers: from the most important tokens on. What they leave gets the layer's own bits.
        evict: share of the least important tokens, which are dropped.
        flush: tokens that are sorted together; a long prompt is sorted as a whole.
    """

    score: str = "attention"
    tiers: Several[Tier] = ()
    evict: float = Field(default=0.0, ge=0, lt=1)
    flush: int = Field(default=320, ge=16)

    @model_validator(mode="after")
    def _adds_up(self) -> TokenPolicy:
        if not self.tiers and not self.evict:
            raise ValueError("a token policy needs tiers, or a share to evict")
        if self.shares[-2] <= 0:
            claimed = ", ".join(f"{tier.share:g}" for tier in self.tiers)
            raise ValueError(f"shares {claimed} and {self.evict:g} to evict leave nothing for the layer's own bits")
        return self

    @property
    def weighs_queries(self) -> bool:
        """Whether every KV head keeps what queries have given to each token that is not sorted yet."""
        return self.score != "recency"

    @property
    def counts_queries(self) -> bool:
        """Whether it is kept, too, how many queries could see such a token."""
        return self.score == "normalised"

    @property
    def shares(self) -> tuple[Fraction, ...]:
        """Of the tiers, of the layer's own bits, and of what is evicted; they add up to 1."""
        tiers = [Fraction(tier.share).limit_denominator(10_000) for tier in self.tiers]
        evicted = Fraction(self.evict).limit_denominator(10_000)
        return (*tiers, 1 - sum(tiers) - evicted, evicted)

    def counts(self, tokens: int) -> tuple[int, ...]:
        """Of so many tokens (a multiple of `flush`), those in each tier, at the layer's bits, and evicted."""
        return tuple(int(share * tokens) for share in self.shares)

    def faults(self, page: int) -> Iterator[str]:
        """Why tiers cannot be whole pages of this many tokens."""
        if self.flush % page:
            yield f"flush must be a multiple of the page of {page} tokens, got {self.flush}"
        elif any((share * self.flush) % page for share in self.shares):
            least = next(
                (n for n in range(page, 513 * page, page) if not any((s * n) % page for s in self.shares)), None
            )
            fit = f"; {least} would do" if least else ""
            yield f"shares of a flush of {self.flush} tokens are no whole pages of {page}{fit}"


class Run(_Setting):
    """Some of the key channels: a number, or a share rounded to a multiple of 16, and their bits."""

    channels: int | None = Field(default=None, ge=WORD_BITS)
    share: float | None = Field(default=None, gt=0, lt=1)
    bits: int

    _width = field_validator("bits")(known_width)

    @model_validator(mode="after")
    def _one(self) -> Run:
        if (self.channels is None) == (self.share is None):
            raise ValueError("give a run its channels or its share, one of them")
        return self

    def width(self, head_dim: int) -> int:
        """Channels of a head of this size."""
        if self.channels is not None:
            return self.channels
        return max(WORD_BITS, round((self.share or 0) * head_dim / WORD_BITS) * WORD_BITS)


class ChannelPolicy(_Setting):
    """Key channels of every KV head are sorted by importance and cut into runs.

    Attributes:
        score: what importance is; a name of `cache/policies`.
        runs: from the most important channels on. What they leave gets the layer's own bits.
        refresh: packed tokens after which channels are sorted anew; 0 is never, a multiple of the page otherwise.
    """

    score: str = "query-range"
    runs: Several[Run]
    refresh: int = Field(default=0, ge=0)

    @field_validator("runs")
    @classmethod
    def _some(cls, runs: tuple[Run, ...]) -> tuple[Run, ...]:
        if not runs:
            raise ValueError("a channel policy needs runs")
        return runs

    @property
    def weighs_queries(self) -> bool:
        """Whether every KV head keeps what queries are like, channel by channel."""
        return self.score == "query-range"

    def widths(self, head_dim: int) -> tuple[int, ...]:
        """Channels of every run, and of what they leave. Raises ValueError if they do not fit the head."""
        if head_dim > MOST_CHANNELS:
            raise ValueError(f"channels can be sorted in heads of up to {MOST_CHANNELS}, not of {head_dim}")
        runs = [run.width(head_dim) for run in self.runs]
        rest = head_dim - sum(runs)
        if rest < WORD_BITS or any(width % WORD_BITS for width in (*runs, rest)):
            raise ValueError(
                f"runs of {' + '.join(map(str, runs))} channels do not fit heads of {head_dim}: runs and what they "
                f"leave must be multiples of {WORD_BITS}"
            )
        return (*runs, rest)

    def faults(self, page: int) -> Iterator[str]:
        """Why it cannot go with pages of this many tokens."""
        if self.refresh % page:
            yield f"refresh must be a multiple of the page of {page} tokens, got {self.refresh}"
