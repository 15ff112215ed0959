"""Transforms: changes of keys and values before they are stored, which attention takes back.

`cache/transforms` implements them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from kvmix_kernels.layout import Kind
from pydantic import Field

from .document.fields import FileSetting, PolicySetting, Several


class Rotate(FileSetting):
    """A rotation of the channels: a Hadamard matrix with random signs, or an orthogonal matrix from a file.

    Attributes:
        seed: seed of the random signs.
        matrix: a safetensors file with `rotation` `[D, D]`, or `layers.N.k` and `layers.N.v` for each layer.
    """

    kind: Literal["rotate"] = "rotate"
    seed: int = Field(default=0, ge=0, lt=2**63)
    matrix: str | None = None

    @property
    def file(self) -> str | None:
        """Return the file that is named; None if there is none."""
        return self.matrix


class Center(FileSetting):
    """A subtraction of every channel's mean, over the prompt or from a file.

    Attributes:
        means: a safetensors file with `layers.N.k` and `layers.N.v`, each `[H_kv, D]`.
    """

    kind: Literal["center"] = "center"
    means: str | None = None

    @property
    def file(self) -> str | None:
        """Return the file that is named; None if there is none."""
        return self.means


class Balance(PolicySetting):
    """A scaling of channels by the prompt's range: keys by `sqrt(max|q| / max|k|)`, values by `1 / sqrt(max|v|)`."""

    kind: Literal["balance"] = "balance"


class OwnTransform(PolicySetting):
    """A transform of the user's own, registered under a name by a file that `--import` names.

    What it keeps of each sequence is not in the count of bytes.
    """

    kind: Literal["own"] = "own"
    name: str


Transform = Annotated[Rotate | Center | Balance | OwnTransform, Field(discriminator="kind")]


class Transforms(PolicySetting):
    """Transforms of keys and of values, in the order in which they are applied."""

    k: Several[Transform] = ()
    v: Several[Transform] = ()

    def then(self, more: Transforms) -> Transforms:
        """Return these transforms followed by others. Raises ValueError if both have one kind for keys, or values."""
        for what, first, second in (("keys", self.k, more.k), ("values", self.v, more.v)):
            if twice := {each.kind for each in first} & {each.kind for each in second}:
                raise ValueError(f"both {sorted(twice)[0]} {what}")
        return Transforms(k=self.k + more.k, v=self.v + more.v)

    def kept(self, kind: Kind) -> int:
        """Return the number of transforms of keys, or values, that keep a number per channel and sequence."""
        transforms = self.k if kind == "key" else self.v
        return sum(isinstance(each, Balance) or (isinstance(each, Center) and not each.means) for each in transforms)
