"""The attention of a loaded model: switched to ours in its text part, and proved by a forward of a few tokens.

A class may take the name of an attention implementation and yet compute some layers on its own, rely on what its own
implementation does with its mask, or give it arguments that another one reads differently. So two rows of tokens go
through the model's own attention and transformers' cache, then through ours and a kvmix cache: earlier tokens must not
depend on later ones, our function must have been called for every layer that a plan can quantize, and the predictions
must be equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from kvmix_kernels.layout import FULL_PRECISION_BITS
from kvmix_kernels.runtime.fallback import warn_once
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..cache.attention import NAME
from ..cache.mixed import MixedCache
from ..errors import KvmixError, ModelError, first_sentence, is_out_of_memory
from ..plan import CacheSettings, LayerPlan, ModelInfo, Plan, TensorPlan
from ..plan.document.geometry import format_ranges
from ..quiet import hushed
from .causality import LIBRARY_ERRORS, TOKENS, sees_no_later_token, trial_logits

TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Largest relative difference of predictions under two right attentions. Products in another order differ by some
rounding units in each layer; a wrong mask or scale changes predictions by about their own size."""


def set_attention(model: PreTrainedModel, name: str) -> bool:
    """Switch the attention implementation of the part that reads text; return whether it was taken.

    Encoders of images and sound keep theirs: they have no cache.
    """
    with hushed(), suppress(ValueError):
        model.set_attn_implementation(_text_only(model.config, name))
    return bool(text_attention(model) == name)


def text_attention(model: PreTrainedModel) -> str:
    """Return the name of the attention implementation of the part that reads text."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def use_attention(model: PreTrainedModel, name: str, info: ModelInfo, before: Tensor) -> None:
    """Switch the attention implementation if the model predicts the same with it.

    A class that does not take the name, or predicts something else with it, keeps its own, with one warning.

    Args:
        name: `kvmix`, or any other that transformers knows, which is not proved.
        before: logits of `trial_logits` with the model's own attention.

    Raises:
        ModelError: if the model does not run with a kvmix cache at all.
    """
    own = text_attention(model)
    is_taken = set_attention(model, name)
    fault = None if is_taken else "does not take"
    if is_taken and name == NAME and (fault := _fault(model, info, before)):
        set_attention(model, own)
        _require_cache(model, info)
    if fault:
        _warn(
            f"{type(model).__name__} {fault} the attention implementation '{name}' and keeps '{own}': "
            "results are right, decoding is slower"
        )


def _fault(model: PreTrainedModel, info: ModelInfo, before: Tensor) -> str | None:
    """Return what the model does wrong with our attention; None if nothing."""
    try:
        with _called_layers() as called, _unwarned():
            ours = trial_logits(model, _cache(model, info))
    except (*LIBRARY_ERRORS, KvmixError) as error:
        if is_out_of_memory(error):
            raise ModelError(f"no memory to run {TOKENS} tokens through {info.id}: use a smaller model") from error
        return f"does not run ({first_sentence(error)}) with"
    if not sees_no_later_token(ours):
        return "attends to later tokens with"
    if not are_equal(before, ours, model.dtype) and not are_equal(_eager_logits(model), ours, model.dtype):
        return "predicts something else with"
    missing = [index for index in info.quantizable if index not in called]
    if missing and None not in called:
        layers = f"layer {missing[0]}" if len(missing) == 1 else f"layers {format_ranges(missing)}"
        _warn(
            f"{type(model).__name__} computes the attention of {layers} on its own: results are right, decoding is "
            "slower"
        )
    return None


def are_equal(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two logits `[2, T, vocabulary]` of the same tokens are equal but for rounding.

    The first token is left out, as it attends to itself alone. The median over the others counts: rounding may send a
    token to another expert.
    """
    if one.shape != other.shape:
        return False
    if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        return True  # damaged weights: whoever measures with them says so
    one, other = one[:, 1:].double(), other[:, 1:].double()
    differences = (one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return bool(differences.flatten().median() <= TOLERANCES.get(dtype, 5e-2))


def _eager_logits(model: PreTrainedModel) -> Tensor:
    """Return the logits with transformers' plainest attention, empty if the model does not run with it.

    A class may name SDPA as its own, which knows neither soft-caps nor sink logits.
    """
    logits = torch.empty(0)
    if set_attention(model, "eager"):
        with suppress(*LIBRARY_ERRORS):
            logits = trial_logits(model, DynamicCache(config=model.config))
    set_attention(model, NAME)
    return logits


def _require_cache(model: PreTrainedModel, info: ModelInfo) -> None:
    """Raise ModelError if a model with its own attention does not run with a kvmix cache."""
    try:
        with _unwarned():
            trial_logits(model, _cache(model, info))
    except (*LIBRARY_ERRORS, KvmixError) as error:
        raise ModelError(
            f"{type(model).__name__} of {info.id} does not run with a kvmix cache: {first_sentence(error)}"
        ) from error


def _cache(model: PreTrainedModel, info: ModelInfo) -> MixedCache:
    """Return an empty kvmix cache that quantizes nothing."""
    full = TensorPlan(bits=FULL_PRECISION_BITS)
    layers = {index: LayerPlan(k=full, v=full) for index in info.quantizable}
    return MixedCache.from_plan(Plan.build(info, layers, CacheSettings()), model.config)


@contextmanager
def _called_layers() -> Iterator[set[Any]]:
    """Within this block collect the index of every layer that calls our attention; None for one without an index."""
    ours, called = AttentionInterface._global_mapping[NAME], set[Any]()

    def noted(module: Any, *args: Any, **kwargs: Any) -> Any:
        called.add(getattr(module, "layer_idx", None))
        return ours(module, *args, **kwargs)

    AttentionInterface.register(NAME, noted)
    try:
        yield called
    finally:
        AttentionInterface.register(NAME, ours)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Within this block say nothing of kernels that are missing: some of these calls are not those of a run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            warn_once.cache_clear()  # so that a run says it


def _text_only(config: PreTrainedConfig, name: str) -> str | dict[str, Any]:
    """Return what `set_attn_implementation` takes to change only the text part of a configuration."""
    text = config.get_text_config(decoder=True)
    found = None if text is config else _path(config, text, name)
    return name if found is None else found


def _path(config: PreTrainedConfig, text: PreTrainedConfig, name: str) -> dict[str, Any] | None:
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is text:
            return {"": name, key: name}
        if isinstance(part, PreTrainedConfig) and (inner := _path(part, text, name)) is not None:
            return {"": name, key: inner}
    return None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
