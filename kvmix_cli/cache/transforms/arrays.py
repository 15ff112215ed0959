"""Tensors that a plan takes from a safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...errors import PlanError, first_sentence


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file. Two are equal if their files, names and numbers are.

    Attributes:
        source: the file, as the plan writes it.
        name: of the tensor.
        digest: of its numbers.
        tensor: on the CPU, in the file's dtype.
    """

    source: str
    name: str
    digest: str
    tensor: Tensor = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"'{self.name}' of {self.source}"

    def numbers(self, shape: Sequence[int | None]) -> Tensor:
        """Return the tensor in float64.

        Args:
            shape: the shape that it must have; None is any number.

        Raises:
            PlanError: if it has another shape, or holds NaN, Inf or complex numbers.
        """
        got = list(self.tensor.shape)
        if len(got) != len(shape) or any(want not in (None, size) for want, size in zip(shape, got, strict=True)):
            wanted = ", ".join("H_kv" if want is None else str(want) for want in shape)
            raise PlanError(f"{self} must be [{wanted}] for this model, but is {got}; give another file")
        if self.tensor.is_complex() or not torch.isfinite(numbers := self.tensor.double()).all():
            raise PlanError(f"{self} is not all finite real numbers; make the file again")
        return numbers


def find(source: str, names: Sequence[str]) -> FileTensor:
    """Return the first of these tensors that a safetensors file has.

    Raises:
        PlanError: if it has none of them, or cannot be read.
    """
    try:
        with safe_open(Path(source).expanduser(), framework="pt", device="cpu") as file:
            name = next((name for name in names if name in file.keys()), None)  # noqa: SIM118  (not iterable itself)
            tensor = None if name is None else file.get_tensor(name)
    except FileNotFoundError as error:
        raise PlanError(f"there is no file {source}; give the path of a safetensors file") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise PlanError(f"cannot read {source}: {first_sentence(error)}; give a safetensors file") from error
    if name is None or tensor is None:
        wanted = " or ".join(f"'{name}'" for name in names)
        raise PlanError(f"{source} has no {wanted}; give a file that was made for this model")
    return FileTensor(source, name, hashlib.sha256(save({name: tensor})).hexdigest(), tensor)
