"""Rotary positions of a model's layers, measured: the rotation that its keys really go through.

Configurations name rotations in many ways (partial, interleaved, scaled, none in some layers), so they are not read.
Instead single tokens are run at several positions. A token alone attends to itself, so that its hidden state is the
same at any position, and keys differ by the rotation only: k(p) = R(p - q) k(q). Those frequencies of the model's
rotary modules, and that arrangement of channels, which reproduce this are the layer's; where none do, there are none.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ..models.loading import LoadedModel
from ..plan.moments import FRAME, Rope, RopeLayout
from .moments import turned
from .observer import observed

TOKENS = 8
"""Tokens that are run at every position."""
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest error of a rotation that explains keys, relative to the pair of channels that it is worst for. A wrong
arrangement is off by about 1. Angles are computed in float32, so the highest frequency is 6e-5 off at position 1,024;
keys in half precision are rounded, and so are the cosines and sines that some models multiply them with."""


def measure_ropes(loaded: LoadedModel) -> dict[int, Rope | None]:
    """Return the rotation of keys in every layer that can be quantized; None where there is none that explains them.

    Raises:
        ModelError: if the model computes attention on its own.
    """
    none: dict[int, Rope | None] = dict.fromkeys(loaded.info.quantizable)
    if "position_ids" not in inspect.signature(loaded.model.forward).parameters or not _frequencies(loaded):
        return none
    limit = min(FRAME, (loaded.max_length or FRAME + 1) - 1)
    positions = torch.tensor([0, 1, limit // 7, limit])
    keys = _keys(loaded, positions)
    frequencies = _frequencies(loaded)  # of these positions: some models compute them for the longest
    return none | {index: _explanation(key, positions, frequencies) for index, key in keys.items()}


def _frequencies(loaded: LoadedModel) -> list[np.ndarray]:
    """Return the different frequencies of all rotary modules, `[n]` each; a layer type may have its own."""
    found: dict[bytes, np.ndarray] = {}
    for module in loaded.model.modules():
        for name, value in vars(module).get("_buffers", {}).items():
            if name.endswith("inv_freq") and isinstance(value, Tensor) and value.ndim == 1 and not value.is_meta:
                array = value.detach().cpu().double().numpy()
                found[array.tobytes()] = array
    return list(found.values())


def _keys(loaded: LoadedModel, positions: Tensor) -> dict[int, Tensor]:
    """Return the keys of some tokens at these positions by layer, `[tokens, positions, H_kv, D]`."""
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    tokens = torch.linspace(0, vocabulary - 1, TOKENS + 2).long()[1:-1]
    shape = (TOKENS, len(positions))
    ids = tokens[:, None].expand(shape).reshape(-1, 1).to(loaded.device)
    at = positions[None].expand(shape).reshape(-1, 1).to(loaded.device)
    keys: dict[int, Tensor] = {}

    def keep(index: int, _: object, __: Tensor, key: Tensor, *___: object) -> None:
        keys[index] = key[:, :, 0].unflatten(0, shape).cpu()

    with torch.no_grad(), observed(loaded, loaded.info.quantizable, keep):
        loaded.model(input_ids=ids, position_ids=at, use_cache=False)
    return keys


def _explanation(keys: Tensor, positions: Tensor, frequencies: list[np.ndarray]) -> Rope | None:
    """Return the rotation that turns the keys at the first position into those at the others, best first."""
    allowed = TOLERANCE.get(keys.dtype, min(TOLERANCE.values()))
    first, others = keys[:, :1].double(), keys[:, 1:].double()
    if _distance(first.expand_as(others), others) <= allowed / 10:
        return None  # keys of this layer do not depend on positions
    by = positions[1:] - positions[:1]
    distances = [
        (_distance(turned(first.expand_as(others).transpose(1, 2), rope, by).transpose(1, 2), others), number, rope)
        for number, rope in enumerate(_candidates(frequencies, keys.shape[-1]))
    ]
    distance, _, rope = min(distances, default=(np.inf, 0, None))
    return rope if distance <= allowed else None


def _candidates(frequencies: list[np.ndarray], head_dim: int) -> Iterator[Rope]:
    for each in frequencies:
        for layout in get_args(RopeLayout):
            for start in sorted({0, head_dim - 2 * len(each)}):
                if start >= 0 and 2 * len(each) <= head_dim:
                    yield Rope(each, layout, start)


def _distance(found: Tensor, keys: Tensor) -> float:
    """Return the error of keys `[tokens, positions, H_kv, D]`, relative to their size, in the worst channel."""
    by_channel = (found - keys).square().sum((0, 1, 2)).sqrt()
    size = keys.square().sum((0, 1, 2)).sqrt()
    return (by_channel / size.clamp_min(float(size.max()) * 1e-6 + 1e-30)).max().item()
