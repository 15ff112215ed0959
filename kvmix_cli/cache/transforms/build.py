"""From a plan's settings to transforms."""

from __future__ import annotations

import torch
from kvmix_kernels.layout import Kind

from ...plan import policies as axes
from .arrays import find
from .balancing import Balancing
from .base import Transform, wide_dtype
from .centering import Centering
from .chain import Chain
from .rotation import Rotation, hadamard, loaded


def build(
    settings: axes.Transforms | None,
    kind: Kind,
    layer: int,
    head_dim: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Chain:
    """What a plan does to one layer's keys, or values, before they are stored.

    Args:
        settings: None for nothing.
        head_dim: of these keys, or values.
        device, dtype: of these keys, or values.

    Raises:
        PlanError: if a file of the plan is missing, or not for this model.
    """
    chosen = () if settings is None else settings.k if kind == "key" else settings.v
    wide = wide_dtype(dtype)
    return Chain(_made(setting, kind, layer, head_dim, torch.device(device), wide) for setting in chosen)


def _made(
    setting: axes.Transform, kind: Kind, layer: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Transform:
    name = f"layers.{layer}.{kind[0]}"
    if isinstance(setting, axes.Rotate):
        if setting.matrix is None:
            return Rotation(hadamard(head_dim, setting.seed, device, dtype))
        return Rotation(loaded(find(setting.matrix, (name, "rotation")), head_dim, device, dtype))
    if isinstance(setting, axes.Center):
        if setting.means is None:
            return Centering(kind)
        stored = find(setting.means, (name,))
        return Centering(kind, stored.numbers((None, head_dim)).to(device, dtype), stored)
    return Balancing(kind, f"layer {layer} {kind}s")
