"""LoRA adapters: a folder or repository with `adapter_config.json`, merged into the model that it was trained on."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.utils import cached_file

from ..errors import ModelError, first_sentence
from ..network import HUB_ERRORS
from ..quiet import hushed
from .sources import ADAPTER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
_FAULTS = (
    AssertionError,
    AttributeError,
    ArithmeticError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""Errors of peft for an adapter that does not fit or is damaged."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: local folder of its files.
        base: id of the model that it was trained on, as its configuration has it.
        revision: of that model, None for the newest.
    """

    folder: Path
    base: str
    revision: str | None


def find_adapter(source: str, revision: str | None) -> Adapter | None:
    """Return the adapter in a folder or repository; None for a model, or where nothing is.

    Raises:
        ModelError: if its configuration cannot be read or does not name its model.
    """
    folder = Path(source)
    if folder.is_dir():
        if (folder / "config.json").is_file() or not (folder / ADAPTER).is_file():
            return None
    else:
        config = _on_hub(source, ADAPTER, revision)
        if config is None or _on_hub(source, "config.json", revision) is not None:
            return None
        _on_hub(source, WEIGHTS, revision)
        folder = config.parent
    try:
        settings = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base, of_base = settings["base_model_name_or_path"], settings.get("revision")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"cannot read {ADAPTER} of the adapter {source}: {first_sentence(error)}") from error
    if not isinstance(base, str) or not base or not (of_base is None or isinstance(of_base, str)):
        raise ModelError(
            f"{ADAPTER} of the adapter {source} does not name the model that it was trained on "
            f"(base_model_name_or_path {base!r}): write its hub id or folder there"
        )
    return Adapter(folder, base, of_base)


def merge_adapter(model: PreTrainedModel, adapter: Adapter, model_id: str) -> PreTrainedModel:
    """Return a model with an adapter merged into its weights.

    Raises:
        ModelError: if peft is missing, or the adapter is damaged or was made for another model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{model_id} is a LoRA adapter of {adapter.base}, merged by peft: pip install 'kvmix[lora]'")
    if not (adapter.folder / WEIGHTS).is_file():
        raise ModelError(f"the adapter {model_id} has no {WEIGHTS}: pickled adapters are not read; save it with peft")
    from peft import PeftConfig, PeftModel

    try:
        with hushed():
            config: Any = PeftConfig.from_pretrained(str(adapter.folder))
            config.inference_mode = True
            wrapped: Any = PeftModel(model, config)
            report = wrapped.load_adapter(str(adapter.folder), "default", is_trainable=False, use_safetensors=True)
            left_out = [name for name in (*report.missing_keys, *report.unexpected_keys) if "lora_" in name]
            merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    except _FAULTS as error:
        raise ModelError(_unfit(model_id, adapter, first_sentence(error))) from error
    if left_out:
        raise ModelError(
            _unfit(model_id, adapter, f"weights do not match: {len(left_out)} of them, such as {left_out[0]}")
        )
    return merged


def _unfit(model_id: str, adapter: Adapter, reason: str) -> str:
    return f"the adapter {model_id} does not fit {adapter.base}, the model that its {ADAPTER} names: {reason}"


def _on_hub(source: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a repository, fetched; None if it is not there, or not to be had."""
    try:
        with hushed():
            found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except HUB_ERRORS:
        return None
    return None if found is None else Path(found)
