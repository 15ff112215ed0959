"""The file of learned codebooks: vectors that stand for neighbouring channels of a model's keys and values. No torch.

A safetensors file beside a profile, copied beside the plans that use it and named by its checksum:

    layers.N.k.W    [H_kv, D / span, 2^(W span), span] float16   of codes of W bits a channel; also `v`
    layers.N.rope.frequencies   [n] float64    only where keys are coded as they are before RoPE
    kvmix                       metadata: one line of JSON, see `_Header`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load, save
from typing_extensions import TypedDict

from ...errors import PlanError, first_sentence
from ...files import safetensors_metadata, write_bytes
from ..document.geometry import HeadGeometry
from .basis import TENSOR_NAMES, TensorName
from .content import check_content, read_content
from .moments import ProfileFile, Rope
from .ropes import RopeRecord, read_ropes, rope_arrays, rope_records

FORMAT: Final = "kvmix-codebooks/1"
Books = NDArray[np.float16]
"""Codebooks of one width, `[H_kv, D / span, 2^(W span), span]`."""


class CodebooksFile(ProfileFile):
    """The record that a score keeps of its codebooks.

    Attributes:
        tokens: tokens that they were learned from.
    """

    tokens: Annotated[int, Field(ge=1, lt=2**48)]


class _Header(TypedDict):
    """Metadata of a file; `rope` is by layer."""

    format: str
    model: str
    rope: dict[str, RopeRecord]


@dataclass(frozen=True, eq=False)
class Codebooks:
    """The codebooks of a model.

    Attributes:
        model: id of the model, for messages.
        layers: by index, those of keys (`"k"`) and of values (`"v"`), by width.
        rope: by index, the turn by which keys are taken back to position 0; a layer without RoPE is not in it.
    """

    model: str
    layers: Mapping[int, Mapping[TensorName, Mapping[int, Books]]]
    rope: Mapping[int, Rope] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Return the checksum of the file."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def content(self) -> bytes:
        """Return the file's content, the same for equal codebooks."""
        arrays: dict[str, NDArray[Any]] = {
            f"layers.{index}.{kind}.{bits}": np.ascontiguousarray(books)
            for index, kinds in sorted(self.layers.items())
            for kind, widths in sorted(kinds.items())
            for bits, books in sorted(widths.items())
        }
        arrays |= rope_arrays(self.rope)
        header = _Header(format=FORMAT, model=self.model, rope=rope_records(self.rope))
        return save(arrays, {"kvmix": json.dumps(header)})

    def save(self, path: Path) -> str:
        """Write the file, and return its checksum. Raises OutputError."""
        write_bytes(path, self.content)
        return self.sha256

    @classmethod
    def load(cls, path: Path, sha256: str) -> Codebooks:
        """Read a file.

        Args:
            path: of the file.
            sha256: checksum that it must have.

        Raises:
            PlanError: if it is missing, cut short, another file than expected, or holds numbers that cannot be used.
        """
        try:
            data = read_content(path)
            check_content(data, sha256)
        except ValueError as error:
            raise _fault(path, str(error)) from error
        try:
            return cls._parsed(load(data), json.loads(safetensors_metadata(data)["kvmix"]))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _fault(path, f"it holds no codebooks ({first_sentence(error)})") from error

    @classmethod
    def _parsed(cls, arrays: Mapping[str, NDArray[Any]], header: _Header) -> Codebooks:
        """Return the codebooks that a file's arrays and header state. Raises ValueError, KeyError or TypeError."""
        if header["format"] != FORMAT:
            raise ValueError(f"its header does not say {FORMAT}")
        layers: dict[int, dict[TensorName, dict[int, Books]]] = {}
        for name, array in arrays.items():
            index, kind, width = name.split(".")[1:4]
            if kind in TENSOR_NAMES:
                layers.setdefault(int(index), {}).setdefault(kind, {})[int(width)] = _checked(name, array, int(width))
        return cls(header["model"], layers, read_ropes(arrays, header["rope"]))

    def tensor(self, path: Path, index: int, kind: TensorName, bits: int, heads: HeadGeometry) -> Books:
        """Return the codebooks of a layer's keys or values at a width. Raises PlanError if they do not fit."""
        found = self.layers.get(index, {}).get(kind, {}).get(bits)
        expected = heads.kv_heads, heads.key_dim if kind == "k" else heads.value_dim
        if found is None:
            raise _fault(path, f"made for {self.model}, with no codebooks of {bits} bits for layer {index} {kind}")
        if (has := (found.shape[0], found.shape[1] * found.shape[3])) != expected:
            sizes = f"{has[0]} x {has[1]} for layer {index} {kind}, which is {expected[0]} x {expected[1]}"
            raise _fault(path, f"made for {self.model}, with codebooks of {sizes}")
        return found


def _checked(name: str, array: NDArray[Any], bits: int) -> Books:
    """Return codebooks of a width. Raises ValueError for arrays that are none."""
    if array.dtype != np.float16 or array.ndim != 4 or array.shape[2] != 1 << bits * array.shape[3]:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, no codebooks of {bits} bits")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has NaN or Inf")
    return array


def _fault(path: Path, why: str) -> PlanError:
    return PlanError(f"codebooks {path}: {why}; use the file that was written with the plan, of this model")
