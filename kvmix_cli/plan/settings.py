"""Cache settings of a plan: pages, groups, sinks, window, transforms and policies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

from kvmix_kernels.layout import ENCODERS, FULL_PRECISION_BITS, Encoder, Kind
from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from .channels import ChannelPolicy
from .codec import TransformSettings
from .document.fields import MOST_TOKENS
from .document.strict_yaml import Faults, StrictModel
from .page_codecs import PageCodecs
from .reading import SelectiveReading
from .tokens import TokenPolicy
from .transforms import Transforms
from .windows import Recent, Rpc, Window

AXES: Final = ("transforms", "tokens", "channels", "reading", "codecs")
"""Settings that change the data, sort it, choose from it, or store it otherwise; see `CacheSettings.axes`."""
Encode = Literal["minmax", "refit", "search", "fitted"]
"""Encoder of all tensors; `fitted` is refit for keys and search for values."""
ENCODES: Final[tuple[Encode, ...]] = (*ENCODERS, "fitted")
FITTED: Final[dict[Kind, Encoder]] = {"key": "refit", "value": "search"}
"""Least squared error is what values need; of keys it clips those that are attended to most."""
Axis = Transforms | TokenPolicy | ChannelPolicy | SelectiveReading | PageCodecs
MOST_ELEMENTS = 2**16
"""Tokens of a page, and elements of a group."""


def _group_size(size: Any) -> Any:
    if size != "row" and (type(size) is not int or size < 8):
        raise ValueError(f"must be a number of at least 8 or 'row', got {size!r}")
    if size != "row" and size > MOST_ELEMENTS:
        raise ValueError(f"must be at most {MOST_ELEMENTS}, or 'row' for one group per row, got {size}")
    return size


GroupSize = Annotated[int | Literal["row"], BeforeValidator(_group_size)]


class CacheSettings(StrictModel):
    """Layout of every layer's cache, `sink | packed pages | tail`, with transforms and policies.

    Attributes:
        page: tokens that are quantized together, once; a multiple of 16.
        sink: first tokens that stay in full precision.
        group_size: elements that share a scale and a zero; `"row"` for a whole page row or head.
        scale_dtype: type of scales and zeros.
        encode: how scales and zeros are chosen, if a tensor does not say.
        window: rule for the recent tokens that stay in full precision.
        transform: basis of the tensors that are stored as transform codes; None for none.
        transforms, tokens, channels: changes of the data, and sorting of tokens and of key channels; None for none.
        reading: choice of the pages that a decoded token reads; None for all.
        codecs: codecs of pages in place of affine codes; None for these.
    """

    page: int = Field(default=128, ge=16, le=MOST_ELEMENTS, multiple_of=16)
    sink: int = Field(default=4, ge=0, le=MOST_TOKENS)
    group_size: GroupSize = 64
    scale_dtype: Literal["float16", "bfloat16"] = "float16"
    encode: Encode = "minmax"
    window: Window = Field(default_factory=Recent)
    transform: TransformSettings | None = None
    transforms: Transforms | None = None
    tokens: TokenPolicy | None = None
    channels: ChannelPolicy | None = None
    reading: SelectiveReading | None = None
    codecs: PageCodecs | None = None

    @model_validator(mode="after")
    def _whole_pages(self) -> CacheSettings:
        faults = [*_unfit(self.axes, self.page), *(("tokens", fault) for fault in self.budget_faults())]
        faults += [] if self.transform is None else self.transform.faults(self.page)
        faults += [("reading", fault) for fault in self.reading_faults()]
        if self.codecs is not None and (others := self._not_with_codecs()):
            faults.append(
                ("codecs", f"page codecs combine with transforms only, not with {', '.join(others)}; take one out")
            )
        if self.codecs is not None and self.codecs.codebooks is not None and self.transforms is not None:
            faults.append(("codecs", "codebooks were learned of keys and values as they are; take the transforms out"))
        if self.transform is not None and (others := [name for name in self.axes if name not in ("reading", "codecs")]):
            faults.append(("transform", f"transform codes do not combine with {', '.join(others)}; take one out"))
        if faults:
            raise Faults((tuple(name.split(".")), f"cache.{name}: {fault}") for name, fault in faults)
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return what files state: axes that are set, and another encoder than that of plans without the setting."""
        unused = {name for name in AXES if getattr(self, name) is None}
        if self.encode == "minmax":
            unused.add("encode")
        if self.transform is None:
            unused.add("transform")
        return {name: value for name, value in write(self).items() if name not in unused}

    def encoder(self, kind: Kind) -> Encoder:
        """Return the encoder of keys, or values, that do not have one of their own."""
        return FITTED[kind] if self.encode == "fitted" else self.encode

    def budget_faults(self) -> Iterator[str]:
        """Yield why this cache cannot keep what its token policy says: a number of tokens, or one for each KV head."""
        if self.tokens is not None and self.tokens.sure is not None and self.channels is not None:
            yield "KV heads that keep different numbers of tokens (sure) have no runs of channels; take one out"
        if self.tokens is None or self.tokens.keep is None:
            return
        if isinstance(self.window, Rpc):
            yield "keep needs a window of a fixed size, recent or none; rpc is a share of the tokens"
        elif self.tokens.keep < (least := self.sink + self.window.keep(0, FULL_PRECISION_BITS)):
            yield f"keep is {self.tokens.keep} tokens, and sinks and window alone are {least}; keep at least as many"
        if self.channels is not None and self.channels.refresh:
            yield "keep drops pages, so channels must be sorted once for all of them: set refresh: 0"

    def reading_faults(self) -> Iterator[str]:
        """Yield why tokens of this cache cannot be read by pages, if a plan chooses among them."""
        if self.reading is None:
            return
        for name in ("tokens", "channels"):
            if getattr(self, name) is not None:
                yield f"{name} are sorted, and pages are read that are in the order of the text; take one out"
        if isinstance(self.window, Rpc):
            yield "keys and values must leave the window together: use a window of a fixed size, recent or none"

    @property
    def kept(self) -> int | None:
        """Return the tokens between sinks and window that a budget of tokens keeps, whole pages; None without one."""
        if self.tokens is None or self.tokens.keep is None:
            return None
        room = self.tokens.keep - self.sink - self.window.keep(0, FULL_PRECISION_BITS)
        return room // self.page * self.page

    def _not_with_codecs(self) -> list[str]:
        """Return the settings that page codecs do not combine with, of those that are set."""
        return [name for name in ("transform", "tokens", "channels", "reading") if getattr(self, name) is not None]

    @property
    def axes(self) -> dict[str, Axis]:
        """Return those of transforms, tokens, channels, reading and codecs that are set."""
        return {name: axis for name in AXES if (axis := getattr(self, name)) is not None}

    @property
    def plain(self) -> CacheSettings:
        """Return the same settings without any of `axes`."""
        return self.model_copy(update=dict.fromkeys(AXES))

    def with_axes(self, other: CacheSettings) -> CacheSettings:
        """Return these settings with the transforms, tokens, channels and reading of `other` added.

        Transforms of `other` come after these. The page stays, unless only the page of `other` suits all policies.

        Raises:
            ValueError: if either has codecs; if both sort tokens, sort channels, choose what is read, or have a
                transform of the same kind;
                if neither page suits all policies; if `other` has no axes; or if these settings have transform codes,
                with which only a choice of what is read combines.
        """
        if not other.axes:
            raise ValueError(
                "it has no transforms, tokens or channels, and no reading, only widths, which the plan has already"
            )
        if self.codecs or other.codecs:
            raise ValueError(
                "page codecs change what every width takes; state codecs and transforms in one preset file"
            )
        if self.transform is not None and set(other.axes) != {"reading"}:
            raise ValueError("the plan's transform codes do not combine with transforms, tokens or channels")
        for name in ("tokens", "channels"):
            if self.axes.get(name) and other.axes.get(name):
                raise ValueError(f"both sort {name}")
        if self.reading and other.reading:
            raise ValueError("both choose the pages that are read")
        axes = {**self.axes, **other.axes}
        if self.transforms and other.transforms:
            axes["transforms"] = self.transforms.then(other.transforms)
        page = next((page for page in (self.page, other.page) if not _unfit(axes, page)), None)
        if page is None:
            raise ValueError("; ".join(f"{name}: {fault}" for name, fault in _unfit(axes, self.page)))
        both = self.model_copy(update={**axes, "page": page})
        if faults := list(both.budget_faults()):
            raise ValueError(f"tokens: {faults[0]}")
        if faults := list(both.reading_faults()):
            raise ValueError(f"reading: {faults[0]}")
        return both


def _unfit(axes: Mapping[str, Any], page: int) -> list[tuple[str, str]]:
    """Return the policies that cannot have pages of `page` tokens, each with the reason."""
    return [(name, fault) for name in AXES[1:] if name in axes for fault in axes[name].faults(page)]
