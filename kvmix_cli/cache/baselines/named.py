"""The baselines by name: how each is made, and what it stores."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ...errors import EvaluationError, did_you_mean
from ...models.geometry import model_info
from ..sizes import layer_nbytes
from .casting import FP8, CastCache
from .stock import StockQuantizedCache

SAMPLE_TOKENS = 1024
"""Held by the cache whose bytes are counted: a whole number of groups, and enough that one scale does not show."""
PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
AXES = {"quanto": 0, "hqq": 1}
"""As transformers' guide recommends. Both put 64 neighbouring channels of one token into a group."""
HQQ_3_BIT_AXIS = 0
"""HQQ 0.2.8 cannot read 3-bit codes of a cache back along axis 1: it takes the tensor for a matrix."""


@dataclass(frozen=True)
class NamedCache:
    """Somebody else's cache; see `evaluation.base.Baseline`.

    Attributes:
        settings: all that its numbers depend on, with the versions of what it is made by.
        stored_bits: bits a number, scales included, counted from the tensors of one that was filled; None if it could
            not be made.
        make: an empty one for a model's configuration.
    """

    name: str
    nominal_bits: float
    settings: dict[str, Any]
    make: Callable[[PreTrainedConfig], Cache] = field(repr=False, compare=False)
    stored_bits: float | None = None

    def cache(self, config: PreTrainedConfig) -> Cache:
        """An empty cache. Raises EvaluationError if what it needs is not installed."""
        try:
            return self.make(config)
        except ImportError as error:
            package = PACKAGES.get(self.settings.get("backend", ""), "transformers")
            raise EvaluationError(f"{self.name} needs {package}: pip install {package}") from error


def _cast(name: str, stored: torch.dtype) -> NamedCache:
    settings = {"dtype": str(stored).removeprefix("torch.")}
    return NamedCache(name, 8 * stored.itemsize, settings, partial(CastCache, stored))


def _stock(name: str, backend: str, bits: int, **options: int) -> NamedCache:
    def make(config: PreTrainedConfig) -> Cache:
        return StockQuantizedCache(backend, config, **options)

    return NamedCache(name, bits, {"backend": backend, **options}, make)


def _grouped(backend: str, bits: int) -> NamedCache:
    """A QuantizedCache of groups; what is not given here is its default, groups of 64 and a residual of 128 tokens."""
    axis = HQQ_3_BIT_AXIS if (backend, bits) == ("hqq", 3) else AXES[backend]
    return _stock(f"hf-{backend}-{bits}", backend, bits, nbits=bits, axis_key=axis, axis_value=axis)


_CACHES = {
    each.name: each
    for each in (
        _cast("bf16", torch.bfloat16),
        _cast("fp8", FP8),
        _stock("hf-fp8", "fp8", 8),
        *(_grouped("quanto", bits) for bits in (4, 2)),
        *(_grouped("hqq", bits) for bits in (8, 4, 3, 2, 1)),
    )
}
BASELINES = tuple(_CACHES)
"""All names."""


def named_cache(name: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> NamedCache:
    """A baseline for a model. Raises EvaluationError for an unknown name."""
    if name not in _CACHES:
        raise EvaluationError(f"no cache '{name}'{did_you_mean(name, BASELINES)}; there are {', '.join(BASELINES)}")
    found = _CACHES[name]
    settings = {**found.settings, **_versions(found.settings.get("backend"))}
    return replace(found, settings=settings, stored_bits=measured_bits(found, config, dtype, device))


def measured_bits(
    found: NamedCache, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> float | None:
    """Bits a number in a layer that holds random ones, from the tensors it has; None if that fails.

    The numbers have the model's geometry, dtype and device: in some caches the size of scales follows the dtype.
    """
    info = model_info(config, "")
    layer = info.quantizable[0]
    shape = (1, info.kv_heads, SAMPLE_TOKENS, info.head_dim)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    try:
        cache = found.cache(config)
        cache.update(keys, values, layer)
    except Exception:  # noqa: BLE001  (whatever goes wrong is said by the row, when the cache is to be measured)
        return None
    return 8 * layer_nbytes(cache.layers[layer]) / (keys.numel() + values.numel())


def _versions(backend: str | None) -> dict[str, str]:
    if backend is None:
        return {}
    versions = {"transformers": transformers.__version__}
    if backend in PACKAGES:
        try:
            versions[PACKAGES[backend]] = importlib.metadata.version(PACKAGES[backend])
        except importlib.metadata.PackageNotFoundError:
            versions[PACKAGES[backend]] = "not installed"
    return versions
