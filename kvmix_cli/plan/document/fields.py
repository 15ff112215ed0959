"""Fields that the settings of a plan share: widths, shares, lists of a file, and paths of tensor files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from kvmix_kernels.layout import BITS, FULL_PRECISION_BITS
from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from typing_extensions import Self

from .strict_yaml import StrictModel

WIDTHS = (*BITS, FULL_PRECISION_BITS)
MOST_TOKENS = 2**20
"""Tokens of one setting, such as a window or a flush: the longest context that a plan can describe."""
MOST_ENTRIES = 16
"""Transforms, tiers or channel groups in one list."""

SHA256 = r"^[0-9a-f]{64}$"
"""Pattern of a file's checksum."""
FOLDER = "folder"
"""Key of a validation's context: the folder of the file that is validated."""


def as_tuple(value: Any) -> Any:
    """Return a list of a file as a tuple, and anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


T = TypeVar("T")
Several = Annotated[tuple[T, ...], BeforeValidator(as_tuple), Field(max_length=MOST_ENTRIES)]
"""A list of a file as a tuple."""
Share = Annotated[float, Field(ge=0, lt=1)]


def known_width(bits: int) -> int:
    """Return a width of a code. Raises ValueError unless it is one of `WIDTHS`."""
    if bits not in WIDTHS:
        raise ValueError(f"must be one of {', '.join(map(str, WIDTHS))}, got {bits}")
    return bits


class PolicySetting(StrictModel):
    """A transform or policy, or a part of one, of which files state what is not the default."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return what files state: the kind of a transform, and everything that is not the default."""
        usual = {name: field.default for name, field in type(self).model_fields.items() if name != "kind"}
        return {name: value for name, value in write(self).items() if getattr(self, name) != usual.get(name, ...)}


class FileSetting(PolicySetting):
    """A setting with a tensor file, whose path in a plan file is relative to that file's folder and stays inside it.

    In Python any path will do; a relative one is relative to the working folder.
    """

    _folder: Path | None = PrivateAttr(default=None)

    @field_validator("matrix", "means", "basis", "codebooks", check_fields=False)
    @classmethod
    def _inside(cls, file: str | None, info: ValidationInfo) -> str | None:
        folder = (info.context or {}).get(FOLDER)
        if file is None or folder is None:
            return file
        root = folder.resolve()
        if file.startswith("~") or "\0" in file or not (root / file).resolve().is_relative_to(root):
            raise ValueError(f"{file!r} leads out of {folder}, the folder of this file: put the tensors inside it")
        if (root / file).resolve() == root:
            raise ValueError(f"{file!r} names no file: write the name of the one with the tensors")
        return file

    def model_post_init(self, context: Any, /) -> None:
        """Keep the folder of the file that the setting comes from."""
        self._folder = (context or {}).get(FOLDER)

    def __eq__(self, other: object) -> bool:
        """Compare what files state; a plan is the same in another folder."""
        return type(self) is type(other) and self.model_dump() == other.model_dump()

    def located(self, file: str) -> str:
        """Return the path of a file of this setting."""
        return file if self._folder is None else str(self._folder / file)

    def inside(self, folder: Path) -> Self:
        """Return the same setting as read from a plan file in a folder. Raises ValueError for a file outside of it."""
        return self.model_validate(self.model_dump(), context={FOLDER: folder})
