"""Page codecs in a plan: another storage of whole pages than scale, zero and codes, and codebooks for it."""

from __future__ import annotations

from collections.abc import Iterator

from kvmix_kernels.layout import Kind
from pydantic import Field, model_validator

from .document.fields import SHA256, FileSetting


class PageCodecs(FileSetting):
    """The codecs of keys and of values, by name (`kvmix_cli.codecs`); None for affine codes.

    The widths of layers are those of the codec; what a layer keeps at 16 bits has none.

    Attributes:
        codebooks: a file of `plan.tensors.codebooks`, for codecs that take learned ones; None for those of the codec.
        sha256: its checksum.
    """

    k: str | None = None
    v: str | None = None
    codebooks: str | None = None
    sha256: str | None = Field(default=None, pattern=SHA256)

    @model_validator(mode="after")
    def _says_something(self) -> PageCodecs:
        if self.k is None and self.v is None:
            raise ValueError("codecs need a name for k, for v, or for both")
        if (self.codebooks is None) != (self.sha256 is None):
            raise ValueError("codebooks and their sha256 go together")
        return self

    def of(self, kind: Kind) -> str | None:
        """Return the name of the codec of keys, or of values."""
        return self.k if kind == "key" else self.v

    def faults(self, page: int) -> Iterator[str]:
        """Yield nothing: a codec takes any page that a plan may have, or says at its layers why not."""
        yield from ()
