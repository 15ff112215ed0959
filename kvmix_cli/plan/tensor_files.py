"""Tensor files that a plan names: a basis of transform codes, codebooks, matrices and means. No torch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from kvmix_kernels.layout import FULL_PRECISION_BITS

from ..errors import PlanError
from .codec import TransformSettings, TransformTensor
from .layers import TensorPlan
from .page_codecs import PageCodecs
from .plan import Plan
from .tensors.basis import BasisFile
from .tensors.codebooks import Codebooks
from .transforms import Center, Rotate

FILES = 2
"""Files of each kind that are kept in memory."""


def check_files(plan: Plan) -> None:
    """Raise PlanError unless all files that a plan names are there, and its basis and its codebooks fit."""
    check_bases(plan)
    check_codebooks(plan)
    transforms = plan.cache.transforms
    for each in () if transforms is None else (*transforms.k, *transforms.v):
        if isinstance(each, (Rotate, Center)) and (named := each.file) is not None:
            path = Path(each.located(named)).expanduser()
            if not path.is_file():
                raise PlanError(f"there is no file {path}; give the path of a safetensors file")


def check_bases(plan: Plan) -> None:
    """Raise PlanError unless the basis of a plan is there and fits the heads of all of its coded layers."""
    for index, layer in plan.layers.items():
        heads = plan.model.heads(index)
        for tensor, kind in layer.tensors:
            if isinstance(tensor, TransformTensor) and plan.cache.transform is not None:
                path, file = open_basis(plan.cache.transform)
                file.tensor(path, index, "k" if kind == "key" else "v", heads)


def check_codebooks(plan: Plan) -> None:
    """Raise PlanError unless the codebooks of a plan are there and fit all of its layers that are coded by them."""
    codecs = plan.cache.codecs
    if codecs is None or codecs.codebooks is None:
        return
    path, file = open_codebooks(codecs)
    for index, layer in plan.layers.items():
        for tensor, kind in layer.tensors:
            if codecs.of(kind) and isinstance(tensor, TensorPlan) and tensor.bits != FULL_PRECISION_BITS:
                file.tensor(path, index, "k" if kind == "key" else "v", tensor.bits, plan.model.heads(index))


def open_codebooks(codecs: PageCodecs) -> tuple[Path, Codebooks]:
    """Return the path and the content of a plan's codebooks, which is kept in memory. Raises PlanError."""
    if codecs.codebooks is None or codecs.sha256 is None:
        raise AssertionError("the plan names its codebooks")
    path = Path(codecs.located(codecs.codebooks))
    return path, _codebooks(path.absolute(), codecs.sha256)


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
def _codebooks(path: Path, sha256: str) -> Codebooks:
    return Codebooks.load(path, sha256)


@lru_cache(maxsize=FILES)
def _loaded(path: Path, sha256: str) -> BasisFile:
    return BasisFile.load(path, sha256)
