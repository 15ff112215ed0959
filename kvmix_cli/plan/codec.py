"""The transform codec in a plan: the widths of a layer's keys or values, and the basis that they belong to.

See docs/plan-format.md for the file, and `kvmix_kernels.transform_layout` for what the widths mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from kvmix_kernels.layout import BITS
from kvmix_kernels.transform_layout import MAX_PAGE, MAX_WIDTH, RUN
from pydantic import BeforeValidator, Field, field_validator

from .document.fields import MOST_TOKENS, SHA256, FileSetting
from .document.geometry import MAX_DIM
from .document.strict_yaml import StrictModel

CODED = "t"
"""Mark of a mean width of transform codes in the short form of plans."""
_DIGITS = frozenset(map(str, range(MAX_WIDTH + 1)))


class TransformTensor(StrictModel):
    """Storage of one layer's keys, or values, as transform codes.

    Attributes:
        widths: of every KV head a text with one digit for each run of 8 directions, the bits of their codes, which
            never rise: `"54332211"`.
    """

    codec: Literal["transform"] = "transform"
    widths: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
        Field(min_length=1),
    ]

    @field_validator("widths")
    @classmethod
    def _falling(cls, widths: tuple[str, ...]) -> tuple[str, ...]:
        for head, digits in enumerate(widths):
            if not digits or len(digits) > MAX_DIM // RUN or not _DIGITS.issuperset(digits):
                raise ValueError(f"KV head {head} must have a digit from 0 to {MAX_WIDTH} for each run, got {digits!r}")
            if digits != "".join(sorted(digits, reverse=True)):
                raise ValueError(f"KV head {head} has widths that rise, {digits!r}; expected the widest first")
        return widths

    @property
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """Return the width of each run of directions, for each KV head."""
        return tuple(tuple(map(int, digits)) for digits in self.widths)

    @property
    def mean_width(self) -> float:
        """Return the mean width over runs; it is the nominal bits of heads that are whole runs."""
        runs = [width for widths in self.runs for width in widths]
        return sum(runs) / len(runs)

    @property
    def window_bits(self) -> int:
        """Return the width whose window applies: the narrowest affine one that is no narrower than the mean."""
        return next(bits for bits in BITS if bits >= self.mean_width)

    @property
    def own(self) -> list[str]:
        """Return what beside the width is not the cache's: nothing."""
        return []

    @property
    def short(self) -> str:
        """Return the mean width as text, `t2.25`."""
        return f"{CODED}{round(self.mean_width, 3):g}"

    def faults(self, kv_heads: int, dim: int) -> Iterator[str]:
        """Yield why the widths do not fit a layer of `kv_heads` heads of `dim` channels."""
        runs = -(-dim // RUN)
        if len(self.widths) != kv_heads:
            yield f"widths are of {len(self.widths)} KV heads; the layer has {kv_heads}"
        elif wrong := [head for head, digits in enumerate(self.widths) if len(digits) != runs]:
            yield f"KV head {wrong[0]} has {len(self.widths[wrong[0]])} widths; its {dim} channels take {runs}"


class TransformSettings(FileSetting):
    """The basis of a plan's transform codes, and the tokens that stay exact.

    Attributes:
        basis: a file of `plan.tensors.basis`.
        sha256: its checksum.
        frame: positions of a frame, whole pages, as the basis was made for; None for none.
        exact: tokens of each page and KV head that stay unquantized, keys and values both.
    """

    basis: str
    sha256: str = Field(pattern=SHA256)
    frame: int | None = Field(default=None, ge=16, le=MOST_TOKENS)
    exact: int = Field(default=1, ge=0, lt=MAX_PAGE)

    def faults(self, page: int) -> Iterator[tuple[str, str]]:
        """Yield what pages of `page` tokens cannot have: the setting and the reason."""
        if page > MAX_PAGE:
            yield "page", f"transform codes have pages of up to {MAX_PAGE} tokens, got {page}"
        if self.frame is not None and self.frame % page:
            yield "transform.frame", f"must be a multiple of the page of {page} tokens, got {self.frame}"
        if self.exact >= page:
            yield "transform.exact", f"must be less than the page of {page} tokens, got {self.exact}"


def codec_of(tensor: Any) -> str:
    """Return the name of the codec that a tensor of a file, or of a plan, asks for."""
    asks = "codec" in tensor if isinstance(tensor, dict) else isinstance(tensor, TransformTensor)
    return "transform" if asks else "affine"
