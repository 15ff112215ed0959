"""The baselines by name: how each is made, and the bits it stores."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, QuantizedCache

from ...errors import EvaluationError, KvmixError, did_you_mean
from ...models.geometry import model_info
from ..mixed import CountingCache
from ..sizes import layer_nbytes
from .casting import CastCache
from .rounding import FP8

SAMPLE_TOKENS = 1024
"""Tokens of the cache whose bytes are counted: whole groups, and enough that a single scale does not show."""
FAILURES = (KvmixError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of other caches for a model they do not support; the row shows them when the cache is to be measured."""
PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
AXES = {"quanto": 0, "hqq": 1}
"""As transformers' guide recommends. Both put 64 neighbouring channels of one token into a group."""
HQQ_3_BIT_AXIS = 0
"""HQQ 0.2.8 cannot read 3-bit codes of a cache back along axis 1: it takes the tensor for a matrix."""


class StockQuantizedCache(CountingCache, QuantizedCache):
    """transformers' `QuantizedCache`, unchanged but for the count of what its queries read.

    At a flush it quantizes everything again, codes of earlier tokens included, and every step dequantizes everything.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values and return all of them, `[B, H_kv, T, D]`."""
        quantized = _quantized_tokens(self.layers[layer_idx])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.attended.add(key_states, keys, quantized)
        return keys, values


def _quantized_tokens(layer: Any) -> int | None:
    """Return the tokens held that the next query reads in quantized form; None if it reads itself so as well."""
    held: int = layer.get_seq_length()
    if held == 0:
        return 0
    if not hasattr(layer, "residual_length"):  # fp8 appends what is new and then reads everything back
        return None
    return held - (layer.keys.shape[-2] if layer.keys.dim() == 4 else 0)


@dataclass(frozen=True)
class NamedCache:
    """A cache of another project; see `cache.subject.Baseline`.

    Attributes:
        name: as commands take it.
        nominal_bits: bits per element, without scales.
        settings: everything that its numbers depend on, with the versions of the packages that make it.
        make: makes an empty one for a model's configuration.
        stored_bits: bits per element, scales included, counted from the tensors of a filled one; None if it could not
            be made.
    """

    name: str
    nominal_bits: float
    settings: dict[str, Any]
    make: Callable[[PreTrainedConfig], Cache] = field(repr=False, compare=False)
    stored_bits: float | None = None

    def cache(self, config: PreTrainedConfig) -> Cache:
        """Return an empty cache. Raises EvaluationError if a package that it needs is not installed."""
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
    """Return a QuantizedCache of groups, by default of 64 elements, with a residual of 128 tokens."""
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
    """Return a baseline for a model. Raises EvaluationError for an unknown name."""
    if name not in _CACHES:
        raise EvaluationError(f"no cache '{name}'{did_you_mean(name, BASELINES)}; known are {', '.join(BASELINES)}")
    found = _CACHES[name]
    settings = {**found.settings, **_versions(found.settings.get("backend"))}
    return replace(found, settings=settings, stored_bits=measured_bits(found, config, dtype, device))


def measured_bits(
    found: NamedCache, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> float | None:
    """Return bits per element of a layer that holds random numbers, from the tensors it has; None if that fails.

    The numbers have the model's geometry, dtype and device: in some caches the size of scales follows the dtype.
    """
    info = model_info(config)
    layer = info.quantizable[0]
    heads = info.heads(layer)
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        torch.randn((1, heads.kv_heads, SAMPLE_TOKENS, dim), generator=generator).to(device, dtype)
        for dim in (heads.key_dim, heads.value_dim)
    )
    try:
        cache = found.cache(config)
        cache.update(keys, values, layer)
    except FAILURES:
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
