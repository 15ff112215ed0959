"""How every layer's cache is cut: pages, groups, sinks, window, and what else happens to keys and values."""

from __future__ import annotations

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

from .axes import ChannelPolicy, TokenPolicy, Transforms
from .files import Faults
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
        policies = {"tokens": self.tokens, "channels": self.channels}
        faults = [
            ((name,), f"cache.{name}: {fault}")
            for name, policy in policies.items()
            if policy is not None
            for fault in policy.faults(self.page)
        ]
        if faults:
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
