"""Basis files as tensors, each made once for a device and shared by all caches of a model."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from kvmix_kernels.transform import Frames, TransformBasis
from kvmix_kernels.transform_layout import TransformLayout
from torch import Tensor

from ..errors import PlanError
from ..plan import HeadGeometry, Plan, TransformSettings, TransformTensor
from ..plan.basis import BasisFile, TensorName
from .buffer import lasting

FILES = 2
"""Basis files that are kept in memory."""
TENSORS = 512
"""Keys or values of a layer whose tensors are kept in memory: those of both files, of models of up to 128 layers."""


class _Directions(NamedTuple):
    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    deviation: Tensor


def check_bases(plan: Plan) -> None:
    """Raise PlanError unless the basis of a plan is there and fits the heads of all of its coded layers."""
    for index, layer in plan.layers.items():
        heads = plan.model.heads(index)
        for tensor, kind in layer.tensors:
            if isinstance(tensor, TransformTensor) and plan.cache.transform is not None:
                path, file = open_basis(plan.cache.transform)
                file.tensor(path, index, "k" if kind == "key" else "v", heads)


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


def open_basis(settings: TransformSettings) -> tuple[Path, BasisFile]:
    """Return the path and the content of a plan's basis, which is kept in memory. Raises PlanError."""
    path = Path(settings.located(settings.basis))
    file = _loaded(path.absolute(), settings.sha256)
    if file.frame != settings.frame:
        raise PlanError(
            f"basis {path}: made for frames of {file.frame}, and the plan says {settings.frame}; use the file that was "
            "written with the plan, or allocate again, which writes both"
        )
    return path, file


@lru_cache(maxsize=FILES)
def _loaded(path: Path, sha256: str) -> BasisFile:
    return BasisFile.load(path, sha256)


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
