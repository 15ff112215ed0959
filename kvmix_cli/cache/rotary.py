"""Rotary positions of a model's layers, measured: the rotation that its keys really go through.

Configurations name rotations in many ways (partial, interleaved, scaled, none in some layers), so they are not read.
Instead single tokens are run at several positions. A token alone attends to itself, so that its hidden state is the
same at any position, and cached keys differ by the rotation only: k(p) = R(p - q) k(q). Those frequencies of the
model's rotary modules, and that arrangement of channels, which reproduce this are the layer's; where none do, there
are none.

A cache is made from a configuration, and some scores of tokens need the rotations: `know_rotations` remembers, for a
model's configuration, how to measure them; `load_model` calls it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from kvmix_kernels.transform import rotate
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..errors import PolicyError
from ..models.geometry import max_length, model_info
from ..plan.tensors.moments import FRAME, Rope, RopeLayout

TOKENS = 8
"""Tokens that are run at every position."""
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest error of a rotation that explains keys, relative to the pair of channels that it is worst for. A wrong
arrangement is off by about 1. Angles are computed in float32, so the highest frequency is 6e-5 off at position 1,024;
keys in half precision are rounded, and so are the cosines and sines that some models multiply them with."""

Rotations = Mapping[int, Rope | None]
"""The rotation of each layer's keys; None for a layer without one."""
_MODELS: dict[int, tuple[weakref.ref[Any], weakref.ref[Any]]] = {}
"""Configuration and model, by the identity of the configuration."""
_MEASURED: dict[int, Rotations] = {}


def know_rotations(model: PreTrainedModel) -> None:
    """Let caches that are made for a model's configuration know its rotary positions; measured when one asks."""
    key = id(model.config)

    def forget(_: object) -> None:
        _MODELS.pop(key, None)
        _MEASURED.pop(key, None)

    _MODELS[key] = weakref.ref(model.config, forget), weakref.ref(model)
    _MEASURED.pop(key, None)


def rotations_of(config: PreTrainedConfig, score: str) -> Rotations:
    """Return the rotations of a model that `know_rotations` was called with, by its configuration.

    Raises:
        PolicyError: if it was not; `score` is named as what needs them.
    """
    key = id(config)
    found = _MODELS.get(key)
    model = None if found is None or found[0]() is not config else found[1]()
    if model is None:
        raise PolicyError(
            f"the score `{score}` reads keys before RoPE, and this model's rotary positions are not known: load it "
            "with kvmix_cli.load_model, or call kvmix_cli.cache.rotary.know_rotations(model) once"
        )
    if key not in _MEASURED:
        info = model_info(config)
        _MEASURED[key] = measure_rotations(model, info.quantizable, max_length(config))
    return _MEASURED[key]


def measure_rotations(model: PreTrainedModel, layers: Sequence[int], limit: int | None) -> dict[int, Rope | None]:
    """Return the rotation of keys in some layers; None where there is none that explains them.

    Args:
        limit: positions that the model was made for, None if unbounded.
    """
    none: dict[int, Rope | None] = dict.fromkeys(layers)
    if "position_ids" not in inspect.signature(model.forward).parameters or not _frequencies(model):
        return none
    last = min(FRAME, (limit or FRAME + 1) - 1)
    positions = torch.tensor([0, 1, last // 7, last])
    keys = _keys(model, layers, positions)
    frequencies = _frequencies(model)  # of these positions: some models compute them for the longest
    return none | {index: _explanation(key, positions, frequencies) for index, key in keys.items()}


def turned(states: Tensor, rope: Rope, positions: Tensor) -> Tensor:
    """Return keys `[..., T, D]` turned by these positions `[T]`, forth where they are positive; in their own dtype."""
    angles = torch.outer(positions.double(), torch.from_numpy(rope.frequencies).to(positions.device))
    return rotate(states, angles, rope.start, rope.layout == "interleaved")


def _frequencies(model: PreTrainedModel) -> list[np.ndarray]:
    """Return the different frequencies of all rotary modules, `[n]` each; a layer type may have its own."""
    found: dict[bytes, np.ndarray] = {}
    for module in model.modules():
        for name, value in vars(module).get("_buffers", {}).items():
            if name.endswith("inv_freq") and isinstance(value, Tensor) and value.ndim == 1 and not value.is_meta:
                array = value.detach().cpu().double().numpy()
                found[array.tobytes()] = array
    return list(found.values())


def _keys(model: PreTrainedModel, layers: Sequence[int], positions: Tensor) -> dict[int, Tensor]:
    """Return the keys that are cached of some tokens at these positions by layer, `[tokens, positions, H_kv, D]`."""
    embedding = model.get_input_embeddings().weight
    tokens = torch.linspace(0, embedding.shape[0] - 1, TOKENS + 2).long()[1:-1]
    shape = (TOKENS, len(positions))
    ids = tokens[:, None].expand(shape).reshape(-1, 1).to(embedding.device)
    at = positions[None].expand(shape).reshape(-1, 1).to(embedding.device)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True)
    return {index: cache.layers[index].keys[:, :, 0].unflatten(0, shape).cpu() for index in layers}


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
