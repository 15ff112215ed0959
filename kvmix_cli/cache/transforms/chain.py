"""Several transforms, one after the other, and how they are made from a plan's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from kvmix_kernels.layout import Kind
from torch import Tensor

from ...plan import transforms
from ..archive import Archive
from ..buffer import lasting
from .arrays import find
from .balancing import Balancing
from .base import TRANSFORMS, Transform, wide_dtype
from .centering import Centering
from .rotation import Rotation, hadamard, loaded


class Chain(Transform):
    """Transforms in the order in which they are applied, perhaps none. Numbers are rounded once, after the last.

    Attributes:
        steps: the transforms.
        is_fitted: nothing is left to be learned.
    """

    def __init__(self, steps: Iterable[Transform] = ()) -> None:
        self.steps = tuple(steps)
        self.is_fitted = not self.steps
        self.needs_queries = any(step.needs_queries for step in self.steps)
        self.shifts_scores = any(step.shifts_scores for step in self.steps)
        self.shifts_output = any(step.shifts_output for step in self.steps)

    def __bool__(self) -> bool:
        return bool(self.steps)

    @lasting
    def fit(self, states: Tensor, query: Tensor | None) -> None:
        """Let each step learn from the prompt as the steps before it transform it."""
        query = query if self.needs_queries else None
        for number, step in enumerate(self.steps, start=1):
            step.fit(states, query)
            if number < len(self.steps):
                states = step.store(states)
                query = None if query is None else step.query(query)
        self.is_fitted = True

    def store(self, states: Tensor) -> Tensor:
        """Return the states `[B, H_kv, S, D]` after every step."""
        return _in_turn([step.store for step in self.steps], states)

    def restore(self, stored: Tensor) -> Tensor:
        """Return the inverse of `store`."""
        return _in_turn([step.restore for step in reversed(self.steps)], stored)

    def query(self, query: Tensor) -> Tensor:
        """Return the queries `[B, H, S, D]` after every step."""
        return _in_turn([step.query for step in self.steps], query)

    def output(self, output: Tensor) -> Tensor:
        """Return the output `[B, H, S, D]` with every step of the values undone."""
        return _in_turn([step.output for step in reversed(self.steps)], output)

    def tensors(self) -> list[Tensor]:
        """Return the state of every step."""
        return [tensor for step in self.steps for tensor in step.tensors()]

    def exchange(self, archive: Archive) -> None:
        """Give the state of every step to an archive, or take it; nothing is left to be learned then."""
        for number, step in enumerate(self.steps):
            step.exchange(archive.part(f"{number}"))
        self.is_fitted = True

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a batch selection or a move to another device to the state of every step."""
        for step in self.steps:
            step.apply(change)


def _in_turn(functions: Sequence[Callable[[Tensor], Tensor]], given: Tensor) -> Tensor:
    if not functions:
        return given
    result = given.to(wide_dtype(given.dtype))
    for function in functions:
        result = function(result)
    return result.to(given.dtype)


def build(
    settings: transforms.Transforms | None,
    kind: Kind,
    layer: int,
    head_dim: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Chain:
    """Return the transforms of one layer's keys or values by a plan's settings.

    Args:
        settings: None for no transforms.
        kind: `key` or `value`.
        layer: index of the layer.
        head_dim: channels of these keys, or values.
        device: of these keys, or values.
        dtype: of these keys, or values.

    Raises:
        PlanError: if a file of the plan is missing, or not for this model, or a transform is unknown.
    """
    chosen = () if settings is None else settings.k if kind == "key" else settings.v
    wide = wide_dtype(dtype)
    return Chain(_step(setting, kind, layer, head_dim, torch.device(device), wide) for setting in chosen)


def _step(
    setting: transforms.Transform, kind: Kind, layer: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Transform:
    if isinstance(setting, transforms.OwnTransform):
        return TRANSFORMS[setting.name]()
    name = f"layers.{layer}.{kind[0]}"
    if isinstance(setting, transforms.Rotate):
        if setting.matrix is None:
            return Rotation(hadamard(head_dim, setting.seed, device, dtype))
        return Rotation(loaded(find(setting.located(setting.matrix), (name, "rotation")), head_dim, device, dtype))
    if isinstance(setting, transforms.Center):
        if setting.means is None:
            return Centering(kind)
        stored = find(setting.located(setting.means), (name,))
        return Centering(kind, stored.numbers((None, head_dim)).to(device, dtype), stored)
    return Balancing(kind, f"layer {layer} {kind}s")
