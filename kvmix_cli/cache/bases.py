"""Basis files as tensors, each made once for a device and shared by all caches of a model."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from kvmix_kernels.transform import Frames, TransformBasis
from kvmix_kernels.transform_layout import TransformLayout
from torch import Tensor

from ..plan import HeadGeometry, TransformSettings
from ..plan.tensor_files import open_basis
from ..plan.tensors.basis import BasisFile, TensorName
from .buffer import lasting

TENSORS = 512
"""Keys or values of a layer whose tensors are kept in memory: those of both files, of models of up to 128 layers."""


class _Directions(NamedTuple):
    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    deviation: Tensor


def basis_of(
    settings: TransformSettings,
    index: int,
    layout: TransformLayout,
    device: torch.device,
    dtype: torch.dtype,
) -> TransformBasis:
    """Return the directions of one layer's keys or values, shared with every caller who asks for the same.

    Args:
        settings: with the file and its checksum.
        index: of the layer.
        layout: of the pages, with the widths.
        device: of the tensors.
        dtype: of the model; float64 makes float64 tensors, everything else float32.

    Raises:
        PlanError: if the file cannot be used, or does not fit.
    """
    path, file = open_basis(settings)
    kind: TensorName = "k" if layout.kind == "key" else "v"
    geometry = HeadGeometry(kv_heads=layout.kv_heads, key_dim=layout.head_dim, value_dim=layout.head_dim)
    file.tensor(path, index, kind, geometry)
    return _basis(file, index, layout, device, torch.float64 if dtype == torch.float64 else torch.float32)


@lru_cache(maxsize=TENSORS)
@lasting
def _basis(
    file: BasisFile, index: int, layout: TransformLayout, device: torch.device, dtype: torch.dtype
) -> TransformBasis:
    directions = _directions(file, index, "k" if layout.kind == "key" else "v", device, dtype)
    basis = TransformBasis(layout, *directions, frames=_frames(file, index, device) if layout.kind == "key" else None)
    _ = basis.widths, basis.levels, basis.steps, basis.decoding  # made here, since later may be inference mode
    return basis


@lru_cache(maxsize=TENSORS)
@lasting
def _directions(file: BasisFile, index: int, kind: TensorName, device: torch.device, dtype: torch.dtype) -> _Directions:
    found = file.layers[index][kind]
    arrays = (found.encode, found.decode, found.mean, found.deviation)
    return _Directions(*(torch.from_numpy(array).to(device, dtype) for array in arrays))


def _frames(file: BasisFile, index: int, device: torch.device) -> Frames | None:
    rope = file.rope.get(index)
    if rope is None or file.frame is None:
        return None
    return Frames(file.frame, torch.from_numpy(rope.frequencies).to(device), rope.start, rope.layout == "interleaved")
