"""The basis file of transform codes: the directions of every layer's keys and values. No torch.

A safetensors file of float32, shared by the plans of one profile and named by its checksum:

    layers.N.k.encode, .decode   [H_kv, D, D]   z = encode (y - mean), y = mean + decode z; also `v`
    layers.N.k.mean, .deviation  [H_kv, D]      deviation is that of each direction of z, falling
    layers.N.rope.frequencies    [n] float64    only where keys are turned to their frame
    kvmix                        metadata: one line of JSON, see `_Header`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load
from typing_extensions import TypedDict

from ...errors import PlanError, first_sentence
from ...files import safetensors_head, safetensors_metadata, write_parts
from ...ranks import own_heads
from ..document.geometry import HeadGeometry
from .content import check_content, read_content
from .moments import Rope
from .ropes import RopeRecord, read_ropes, rope_arrays, rope_records

FORMAT: Final = "kvmix-basis/1"
_DTYPES: Final = {np.dtype(np.float64): "F64", np.dtype(np.float32): "F32"}
"""Names of dtypes in safetensors."""
TensorName = Literal["k", "v"]
TENSOR_NAMES: Final[tuple[TensorName, ...]] = ("k", "v")
Floats = NDArray[np.float32]
Variances = Mapping[tuple[int, TensorName], NDArray[np.float64]]
"""Of the directions of each layer's keys and values, `[H_kv, D]`, half of which is a loss in nats a token."""


class _Header(TypedDict):
    """Metadata of a basis file; `rope` is by layer."""

    format: str
    model: str
    frame: int | None
    rope: dict[str, RopeRecord]


@dataclass(frozen=True, eq=False)
class LayerBasis:
    """The directions of one layer's keys, or values.

    Attributes:
        encode, decode: `[H_kv, D, D]` float32.
        mean: `[H_kv, D]` float32.
        deviation: `[H_kv, D]` float32, positive.
    """

    encode: Floats
    decode: Floats
    mean: Floats
    deviation: Floats

    def part(self, rank: int, ranks: int) -> LayerBasis:
        """Return the directions of the heads of one of several ranks."""
        own = own_heads(len(self.mean), rank, ranks)
        return LayerBasis(self.encode[own], self.decode[own], self.mean[own], self.deviation[own])

    def faults(self) -> list[str]:
        """Return what is wrong with the arrays."""
        heads, dim = self.mean.shape if self.mean.ndim == 2 else (0, 0)
        square = (heads, dim, dim)
        expected = {"encode": square, "decode": square, "mean": (heads, dim), "deviation": (heads, dim)}
        for name, shape in expected.items():
            array = getattr(self, name)
            if array.dtype != np.float32 or array.shape != shape or not array.size:
                return [f"{name} is {array.dtype} {list(array.shape)} beside a mean of {list(self.mean.shape)}"]
            if not np.isfinite(array).all():
                return [f"{name} has NaN or Inf"]
        return [] if (self.deviation > 0).all() else ["deviation has numbers that are not positive"]


@dataclass(frozen=True, eq=False)
class BasisFile:
    """The directions of a model's layers.

    Attributes:
        model: id of the model, for messages.
        layers: by index, those of keys (`"k"`) and of values (`"v"`).
        frame: positions of a frame that keys are turned to the start of; None for none.
        rope: by index, the turn of keys by RoPE; a layer without RoPE is not in it.
    """

    model: str
    layers: Mapping[int, Mapping[TensorName, LayerBasis]]
    frame: int | None = None
    rope: Mapping[int, Rope] = field(default_factory=dict)

    def part(self, rank: int, ranks: int) -> BasisFile:
        """Return the directions of the KV heads of one of several ranks; each has as many of every layer."""
        layers = {
            index: {name: each.part(rank, ranks) for name, each in kinds.items()}
            for index, kinds in self.layers.items()
        }
        return replace(self, layers=layers)

    def variances(self, layers: Collection[int]) -> Variances:
        """Return the variances of the directions of these layers."""
        kinds = ((index, name, self.layers[index][name]) for index in layers for name in TENSOR_NAMES)
        return {(index, name): each.deviation.astype(np.float64) ** 2 for index, name, each in kinds}

    @cached_property
    def sha256(self) -> str:
        """Return the checksum of the file."""
        digest = hashlib.sha256()
        for part in self._parts():
            digest.update(part)
        return digest.hexdigest()

    def save(self, path: Path) -> str:
        """Write the file, and return its checksum. Raises OutputError."""
        write_parts(path, self._parts())
        return self.sha256

    def _parts(self) -> Iterator[bytes | memoryview]:
        """Yield the file part by part, the same for equal bases, so that no second copy of it is made."""
        arrays: dict[str, NDArray[Any]] = {}
        for index, kinds in self.layers.items():
            for kind, each in kinds.items():
                arrays |= {f"layers.{index}.{kind}.{name}": array for name, array in vars(each).items()}
        ordered = {
            name: np.ascontiguousarray(each)
            for part in (rope_arrays(self.rope), arrays)
            for name, each in sorted(part.items())
        }
        header = _Header(format=FORMAT, model=self.model, frame=self.frame, rope=rope_records(self.rope))
        forms = {name: (_DTYPES[array.dtype], array.shape, array.nbytes) for name, array in ordered.items()}
        yield safetensors_head(forms, {"kvmix": json.dumps(header)})
        for array in ordered.values():
            yield array.reshape(-1).view(np.uint8).data

    @classmethod
    def load(cls, path: Path, sha256: str | None = None) -> BasisFile:
        """Read a file.

        Args:
            path: of the file.
            sha256: checksum that it must have; None for any.

        Raises:
            PlanError: if it is missing, cut short, another file than expected, or holds numbers that cannot be used.
        """
        try:
            data = read_content(path)
        except ValueError as error:
            raise _fault(path, str(error), "put the file back where the plan names it") from error
        try:
            arrays = load(data)
            header = json.loads(safetensors_metadata(data)["kvmix"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _fault(path, f"cut short, or no basis ({first_sentence(error)})", "copy the file again") from error
        try:
            if sha256 is not None:
                check_content(data, sha256)
        except ValueError as error:
            raise _fault(path, str(error), "use the file that was written with the plan") from error
        return cls._parsed(path, arrays, header)

    @classmethod
    def _parsed(cls, path: Path, arrays: dict[str, NDArray[Any]], header: Any) -> BasisFile:
        """Return the basis that a file's arrays and header state. Raises PlanError."""
        advice = "copy the file again"
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise _fault(path, f"its header does not say {FORMAT}", advice)
        layers: dict[int, dict[TensorName, LayerBasis]] = {}
        try:
            for name in arrays:
                index, kind = name.split(".")[1:3]
                if kind in TENSOR_NAMES and kind not in layers.setdefault(int(index), {}):
                    parts = {
                        each: arrays[f"layers.{index}.{kind}.{each}"].copy() for each in LayerBasis.__annotations__
                    }
                    layers[int(index)][kind] = each = LayerBasis(**parts)
                    if faults := each.faults():
                        raise _fault(path, f"layer {index} {kind}: {faults[0]}", advice)
            rope = read_ropes(arrays, header["rope"])
            for layer, turn in rope.items():
                channels = layers[layer]["k"].mean.shape[1] - 2 * len(turn.frequencies)
                if not 0 <= turn.start <= channels:
                    raise ValueError(f"RoPE of layer {layer} turns {turn.layout!r} channels from {turn.start} on")
            return cls(header["model"], layers, header["frame"], rope)
        except (KeyError, TypeError, ValueError) as error:
            raise _fault(path, f"incomplete ({first_sentence(error)})", advice) from error

    def tensor(self, path: Path, index: int, kind: TensorName, heads: HeadGeometry) -> LayerBasis:
        """Return the directions of a layer's keys or values. Raises PlanError if they do not fit a model's heads."""
        found = self.layers.get(index, {}).get(kind)
        expected = heads.kv_heads, heads.key_dim if kind == "k" else heads.value_dim
        if found is None or found.mean.shape != expected:
            has = "no directions" if found is None else f"directions of {found.mean.shape[0]} x {found.mean.shape[1]}"
            why = f"made for {self.model}, with {has} for layer {index} {kind}, which is {expected[0]} x {expected[1]}"
            raise _fault(path, why, "use the basis of this model")
        return found


def _fault(path: Path, why: str, advice: str) -> PlanError:
    return PlanError(f"basis {path}: {why}; {advice}; or allocate again, which writes plan and basis")
