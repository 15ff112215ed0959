"""How every layer's cache is cut: pages, groups, sinks, window, and what else happens to keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from .document import Faults
from .policies import ChannelPolicy, TokenPolicy, Transforms
from .windows import Recent, Window

AXES: Final = ("transforms", "tokens", "channels")
"""Settings that do more than cut the cache; see `axes`."""


def _group_size(size: Any) -> Any:
    if size != "row" and (type(size) is not int or size < 8):
        raise ValueError(f"must be a number of at least 8 or 'row', got {size!r}")
    return size


GroupSize = Annotated[int | Literal["row"], BeforeValidator(_group_size)]


class CacheSettings(BaseModel):
    """How every layer's cache is cut: `sink | packed pages | tail`.

    Attributes:
        page: tokens that are quantized together, once; a multiple of 16.
        sink: first tokens that stay in full precision.
        group_size: elements that share a scale and a zero; `"row"` for a whole page row or head.
        scale_dtype: of scales and zeros.
        window: which recent tokens stay in full precision.
        transforms, tokens, channels: what else happens to keys and values; see `axes`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    page: int = Field(default=128, ge=16, multiple_of=16)
    sink: int = Field(default=4, ge=0)
    group_size: GroupSize = 64
    scale_dtype: Literal["float16", "bfloat16"] = "float16"
    window: Window = Field(default_factory=Recent)
    transforms: Transforms | None = None
    tokens: TokenPolicy | None = None
    channels: ChannelPolicy | None = None

    @model_validator(mode="after")
    def _whole_pages(self) -> CacheSettings:
        if faults := [((name,), f"cache.{name}: {fault}") for name, fault in _unfit(self.axes, self.page)]:
            raise Faults(faults)
        return self

    @model_serializer(mode="wrap")
    def _without_unused_axes(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in write(self).items() if name not in AXES or value is not None}

    @property
    def axes(self) -> dict[str, Transforms | TokenPolicy | ChannelPolicy]:
        """Those of transforms, tokens and channels that are set."""
        return {name: axis for name in AXES if (axis := getattr(self, name)) is not None}

    @property
    def plain(self) -> CacheSettings:
        """The same without any of them."""
        return self.model_copy(update=dict.fromkeys(AXES))

    def with_axes(self, other: CacheSettings) -> CacheSettings:
        """These settings, and the transforms, tokens and channels of others.

        Transforms are applied after one's own. The page is that of the others where policies need it, one's own if not.

        Raises:
            ValueError: if both sort tokens, sort channels, or transform the same thing in the same way; if no page of
                theirs suits all policies; or if the others have no axes.
        """
        if not other.axes:
            raise ValueError("it has no transforms, tokens or channels, only widths, and those are decided already")
        for name in ("tokens", "channels"):
            if self.axes.get(name) and other.axes.get(name):
                raise ValueError(f"both sort {name}")
        axes = {**self.axes, **other.axes}
        if self.transforms and other.transforms:
            axes["transforms"] = self.transforms.then(other.transforms)
        page = next((page for page in (self.page, other.page) if not _unfit(axes, page)), None)
        if page is None:
            raise ValueError("; ".join(f"{name}: {fault}" for name, fault in _unfit(axes, self.page)))
        return self.model_copy(update={**axes, "page": page})


def _unfit(axes: Mapping[str, Any], page: int) -> list[tuple[str, str]]:
    """Which policies cannot go with pages of so many tokens, and why."""
    return [(name, fault) for name in ("tokens", "channels") if name in axes for fault in axes[name].faults(page)]
