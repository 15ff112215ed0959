"""Loading models: the only `from_pretrained` of the package.

A model is a hub id, a local folder, or `builtin:tiny`, the reference model inside the package. `HF_HOME`,
`HF_HUB_OFFLINE` and `HF_TOKEN` work as everywhere.
"""

from __future__ import annotations

import importlib.util
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from ..cache.attention import register_attention
from ..errors import ModelError, did_you_mean, first_sentence
from ..plan import ModelInfo
from ..quiet import hushed, verbose
from .geometry import max_length, model_info

__all__ = ["LoadedModel", "load_info", "load_model"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BUILTIN = "builtin:"
_ASSETS = Path(__file__).parents[1] / "assets"
_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    EOFError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)
"""What the libraries raise for a checkpoint that is missing, damaged or of an unknown kind."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, in evaluation mode.

    Attributes:
        model: a causal language model whose attention implementation is `kvmix` where its class allows one.
        tokenizer: its tokenizer.
        info: its layers and heads.
        max_length: tokens it was made for, None if unbounded.
    """

    model: PreTrainedModel
    tokenizer: Any
    info: ModelInfo
    max_length: int | None

    @property
    def device(self) -> torch.device:
        """Return the device of token ids; with a device map, other layers may live elsewhere."""
        return self.model.get_input_embeddings().weight.device

    @property
    def config(self) -> PreTrainedConfig:
        """Return the model's configuration."""
        return self.model.config

    @property
    def dtype(self) -> str:
        """Return the name of the weights' dtype: `float32`, `bfloat16` or `float16`."""
        return str(self.model.dtype).removeprefix("torch.")


def load_model(
    model_id: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attention: str = "kvmix",
) -> LoadedModel:
    """Load a model with its tokenizer.

    Args:
        model_id: hub id, local folder or `builtin:tiny`.
        dtype: `auto` (the checkpoint's; float32 for a builtin model on the CPU), float32, bfloat16 or float16.
        device: `auto` (CUDA if there is any), `map` (spread over all devices by accelerate), or a torch device.
        attention: attention implementation; a class that rejects it keeps its own, with a warning.

    Raises:
        ModelError: if it cannot be loaded as asked, or has nothing to quantize.
    """
    device = _resolve_device(device)
    source = _source(model_id)
    config = _load_config(model_id, source, revision, trust_remote_code)
    info = model_info(config, model_id, revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = _load_tokenizer(model_id, source, options)
    if device == "map":
        options["device_map"] = "auto"
    model = _load_weights(model_id, source, {**options, "config": config, "dtype": _dtype(dtype, model_id, device)})
    if device != "map":
        model = _move(model, model_id, device)
    register_attention()
    _use_attention(model, attention)
    return LoadedModel(model.eval(), tokenizer, info, max_length(config))


def load_info(model_id: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelInfo:
    """Layers and heads of a model, from its configuration alone. Raises ModelError."""
    config = _load_config(model_id, _source(model_id), revision, trust_remote_code)
    return model_info(config, model_id, revision)


def _source(model_id: str) -> str:
    """What transformers should load: a folder, or the hub id as it is."""
    if model_id.startswith(_BUILTIN):
        return str(_builtin_folder(model_id.removeprefix(_BUILTIN)))
    path = Path(model_id).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{model_id} has no config.json: a model folder holds it, a tokenizer and *.safetensors")
        return str(path)
    if path.exists():
        raise ModelError(f"{model_id} is a file: give the folder that holds the model")
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise ModelError(f"no folder {model_id}: give a model folder, a hub id or builtin:tiny")
    return model_id


def _builtin_folder(name: str) -> Path:
    known = sorted(path.parent.name for path in _ASSETS.glob("*/config.json"))
    if name not in known:
        names = ", ".join(_BUILTIN + other for other in known)
        raise ModelError(f"no built-in model '{name}'{did_you_mean(name, known)}: there is {names}")
    return _ASSETS / name


def _load_config(model_id: str, source: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except _UNREADABLE as error:
        raise ModelError(f"cannot load {model_id}: {first_sentence(error)}; {_advice(model_id, error)}") from error
    has_own_code = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
        raise ModelError(f"{model_id} is no causal language model, but of type {config.model_type}")
    return config


def _load_tokenizer(model_id: str, source: str, options: dict[str, Any]) -> Any:
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(source, **options)
    except _UNREADABLE as error:
        advice = "it needs tokenizer.json, or for an older format `pip install sentencepiece tiktoken`"
        raise ModelError(f"{model_id} has no tokenizer that can be loaded: {advice}") from error


def _load_weights(model_id: str, source: str, options: dict[str, Any]) -> PreTrainedModel:
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{model_id} does not fit on the device: use a smaller model or --device map") from error
    except _UNREADABLE as error:
        raise ModelError(f"cannot load the weights of {model_id}: {first_sentence(error)}") from error
    _require_complete(model_id, report)
    return model


def _require_complete(model_id: str, report: dict[str, Any]) -> None:
    """transformers fills what a checkpoint lacks with random numbers; nobody wants those measured."""
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    for names, fault in ((set(report["missing_keys"]), "lacks"), (mismatched, "has in another shape")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ModelError(f"{model_id} {fault} {len(names)} of the weights that its config.json asks for: {some}")


def _move(model: PreTrainedModel, model_id: str, device: str) -> PreTrainedModel:
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{model_id} does not fit on {device}: use a smaller model or --device map") from error


def _use_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the attention implementation; a class that does not take the name keeps its own, with one warning."""
    with _quiet(), suppress(ValueError):
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        warnings.warn(
            f"{type(model).__name__} does not take the attention implementation '{name}' and keeps "
            f"'{model.config._attn_implementation}': results are right, decoding is slower",
            stacklevel=3,
        )


def _resolve_device(name: str) -> str:
    """A torch device, or `map`. Raises ModelError if it does not exist here."""
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    if name == "auto":
        if torch.cuda.device_count() > 1 and has_accelerate:
            return "map"
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "map":
        if not has_accelerate:
            raise ModelError("--device map spreads a model with accelerate: pip install 'kvmix[multi-gpu]'")
        return name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"no device '{name}' here: use auto, cpu, cuda or map") from error
    return name


def _dtype(name: str, model_id: str, device: str) -> torch.dtype | str:
    if name == "auto":
        on_cpu = model_id.startswith(_BUILTIN) and device == "cpu"
        return torch.float32 if on_cpu else "auto"
    if name not in DTYPES:
        known = ["auto", *DTYPES]
        raise ModelError(f"unknown dtype '{name}'{did_you_mean(name, known)}: use {', '.join(known)}")
    return DTYPES[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' log and its bar over weights, unless `kvmix -v`. Downloads keep theirs."""
    bars = transformers_logging.is_progress_bar_enabled()
    with hushed():
        if not verbose():
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if bars:
                transformers_logging.enable_progress_bar()


def _advice(model_id: str, error: BaseException) -> str:
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        return "read that code, then pass --trust-remote-code"
    if Path(model_id).expanduser().is_dir() or not isinstance(error, OSError):
        return "its config.json must be that of a causal language model which this transformers knows"
    return "check the name and the network, set HF_TOKEN if it is gated, or use a local folder or builtin:tiny"
