"""Moments of keys and values, and of the loss's gradient with respect to them, in a safetensors file beside a profile.

    layers.N.k.metric       [H, D (D+1) / 2]   second moments of the gradient: the loss metric, nats a predicted token
    layers.N.k.covariance   [H, D (D+1) / 2]   of the keys
    layers.N.k.mean         [H, D]
    layers.N.rope.frequencies   [n]     radians a position of each pair of channels; absent without rotary positions

and the same for `v`, all float32 but the frequencies. Of a symmetric matrix the upper triangle is kept, row by row;
files of whole matrices `[H, D, D]` are read, too. Keys and their gradients are turned to the start of their frame:
R(-p0) k with p0 = F * ((t - sink) // F) for the token at position t >= sink and frames of F positions, so that their
moments are those of positions sink to sink + F - 1 at any context length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ...errors import DocumentError
from ...files import safetensors_metadata, write_bytes
from ..document.strict_yaml import StrictModel

FRAME = 1024
"""Positions that share one origin of their rotation, if a profile is not asked for others."""
Array = NDArray[Any]
RopeLayout = Literal["half", "interleaved"]
"""Pairs that a rotation turns: channels `c` and `c + n`, or `2 c` and `2 c + 1`, from the first rotated one on."""
_COUNT = Field(ge=1, lt=2**48)


class Rope(NamedTuple):
    """Rotary positions of one layer: `2 n` channels of every head from `start` on are turned, the others are not.

    Attributes:
        frequencies: radians a position of each pair, `[n]`, float64.
    """

    frequencies: NDArray[np.float64]
    layout: RopeLayout
    start: int

    @property
    def pairs(self) -> NDArray[np.intp]:
        """Return the two channels of every pair, `[n, 2]`."""
        channels = self.start + np.arange(2 * len(self.frequencies))
        return channels.reshape(2, -1).T if self.layout == "half" else channels.reshape(-1, 2)


class TensorMoments(NamedTuple):
    """Moments of one layer's keys, or values: `[H, D, D]`, `[H, D, D]` and `[H, D]`; the matrices are symmetric."""

    metric: Array
    covariance: Array
    mean: Array


class LayerMoments(NamedTuple):
    """Moments of one layer's keys and values; without `rope` its keys are stored as they are."""

    k: TensorMoments
    v: TensorMoments
    rope: Rope | None


class ProfileFile(StrictModel):
    """The record that a score keeps of a file with its tensors.

    Attributes:
        file: name of the file, in the folder of the profile.
        sha256: checksum of the file.
    """

    file: str
    sha256: str

    @field_validator("file")
    @classmethod
    def _is_beside(cls, file: str) -> str:
        if Path(file).name != file:
            raise ValueError(f"must be the name of a file in the folder of the profile, got {file}")
        return file


class MomentsFile(ProfileFile):
    """The record that a score keeps of its moments.

    Attributes:
        documents: calibration documents.
        predictions: predictions that read something packed, over which the metric is a mean.
        tokens: tokens that some prediction found packed.
        frame: positions of a frame.
    """

    documents: Annotated[int, _COUNT]
    predictions: Annotated[int, _COUNT]
    tokens: Annotated[int, _COUNT]
    frame: Annotated[int, _COUNT] = FRAME


def write_moments(path: Path, layers: Mapping[int, LayerMoments]) -> str:
    """Write moments to a file, whole or not at all, and return its checksum. Raises OutputError."""
    tensors: dict[str, Array] = {}
    ropes: dict[int, dict[str, str | int]] = {}
    for index, layer in layers.items():
        for kind, moments in (("k", layer.k), ("v", layer.v)):
            for name, array in moments._asdict().items():
                kept = _triangle(array) if array.ndim == 3 else array
                tensors[f"layers.{index}.{kind}.{name}"] = np.ascontiguousarray(kept, np.float32)
        if layer.rope is not None:
            tensors[f"layers.{index}.rope.frequencies"] = np.ascontiguousarray(layer.rope.frequencies, np.float64)
            ropes[index] = {"layout": layer.rope.layout, "start": layer.rope.start}
    # one entry of metadata: the order of several is random, and the checksum would be
    data = save(tensors, {"rope": json.dumps(ropes)})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_moments(folder: Path, record: MomentsFile) -> dict[int, LayerMoments]:
    """Return the moments of all layers.

    Args:
        folder: folder of the profile that has the record.

    Raises:
        DocumentError: if the file is missing, is another one than the record names, or has not all of its tensors.
    """
    path = folder / record.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unusable(path, f"it cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise _unusable(path, "it is not the file that the profile was written with, or was cut short")
    try:
        tensors = load(data)
        ropes = json.loads(safetensors_metadata(data)["rope"])
        indices = sorted({int(name.split(".")[1]) for name in tensors})
        return {index: _layer(tensors, index, ropes.get(str(index))) for index in indices}
    except (SafetensorError, ValueError, KeyError, IndexError) as error:
        raise _unusable(path, f"it holds no moments of keys and values ({error})") from error


def _layer(tensors: Mapping[str, Array], index: int, rope: Mapping[str, Any] | None) -> LayerMoments:
    k, v = (_tensor(*(tensors[f"layers.{index}.{kind}.{name}"] for name in TensorMoments._fields)) for kind in "kv")
    if rope is None:
        return LayerMoments(k, v, None)
    return LayerMoments(k, v, Rope(tensors[f"layers.{index}.rope.frequencies"], rope["layout"], int(rope["start"])))


def _tensor(metric: Array, covariance: Array, mean: Array) -> TensorMoments:
    return TensorMoments(_whole(metric, mean.shape[-1]), _whole(covariance, mean.shape[-1]), mean)


def _triangle(matrices: Array) -> Array:
    """Return the upper triangles of symmetric matrices `[H, D, D]`, row by row, `[H, D (D + 1) / 2]`."""
    rows, columns = np.triu_indices(matrices.shape[-1])
    upper: Array = matrices[:, rows, columns]
    return upper


def _whole(kept: Array, dim: int) -> Array:
    """Return matrices `[H, D, D]`. Raises ValueError for a triangle of another size."""
    if kept.ndim == 3:
        return kept
    rows, columns = np.triu_indices(dim)
    if kept.shape[1:] != rows.shape:
        raise ValueError(f"a triangle of {dim} channels has {len(rows)} entries, got {list(kept.shape[1:])}")
    place = np.empty((dim, dim), np.intp)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    whole: Array = np.take(kept, place, axis=1)
    return whole


def _unusable(path: Path, why: str) -> DocumentError:
    return DocumentError(str(path), [f"{why}; measure it again with --score fisher-metric"])
