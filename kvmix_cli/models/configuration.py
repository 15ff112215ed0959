"""Finding a model and reading its configuration, without its weights. Loads no torch of its own.

transformers loads torch with its configurations wherever it is installed; see `torchless` for a way around it.
"""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from .. import torchless
from ..errors import ModelError, first_sentence
from ..network import HTTP_ERROR, is_offline
from ..plan import ModelInfo
from ..plan.document.geometry import MAX_LAYERS
from ..quiet import hushed, verbose
from .adapters import Adapter, find_adapter
from .geometry import model_info
from .gguf import SUFFIX, check_gguf, gguf_settings, read_header
from .multimodal import find_loader, without_speech
from .sources import canonical_id, explain, locate, meta_sibling

PARTS_OF_ENCODER_DECODERS = frozenset({"musicgen", "musicgen_melody", "trocr", "whisper"})
"""Model types whose decoder alone is listed as a causal language model, but was never trained without its encoder."""
MAX_SHOWN = 80
"""Characters of a wrong setting that an error shows."""
UNREADABLE = (
    AssertionError,
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
    HTTP_ERROR,
    pickle.UnpicklingError,
)
"""Errors of the libraries for a checkpoint that is missing, damaged or of an unknown kind."""


@dataclass(frozen=True)
class Checkpoint:
    """The place of a model, and what is needed to read from it.

    Attributes:
        id: canonical id of the model.
        source: folder or hub id.
        gguf: name of the GGUF file in the folder that has everything; None for the layout of transformers.
        adapter: LoRA adapter that is merged into the model.
    """

    id: str
    source: str
    revision: str | None
    trust_remote_code: bool
    gguf: str | None = None
    adapter: Adapter | None = None

    @property
    def path(self) -> Path:
        """Return the folder, or the GGUF file, of a model on this machine."""
        return Path(self.source) if self.gguf is None else Path(self.source) / self.gguf

    @property
    def options(self) -> dict[str, Any]:
        file = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code, **file}


def load_info(model_id: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelInfo:
    """Return the layers and heads of a model, from its configuration alone. Raises ModelError."""
    checkpoint, config = find_config(str(model_id), revision, trust_remote_code)
    return model_info(config, checkpoint.id, checkpoint.revision)


def find_config(
    model_id: str, revision: str | None, trust_remote_code: bool, adapted_by: str | None = None
) -> tuple[Checkpoint, PreTrainedConfig]:
    """Find a model and read its configuration.

    Of one in Meta's layout it is that of the repository beside it, of an adapter that of the model it was trained on.

    Args:
        adapted_by: adapter that the model is wanted for.
    """
    source = locate(model_id)
    checkpoint = Checkpoint(canonical_id(model_id), source, revision, trust_remote_code)
    if source.lower().endswith(SUFFIX):
        check_gguf(Path(source))
        checkpoint = replace(checkpoint, source=str(Path(source).parent), gguf=Path(source).name)
    try:
        return checkpoint, _load_config(checkpoint)
    except ModelError as error:
        if is_offline(error):
            raise
        if (adapter := find_adapter(source, revision)) is not None:
            if adapted_by is not None:
                reason = f"an adapter of {model_id}, which is an adapter itself"
                raise ModelError(f"{adapted_by} is {reason}: merge that one first") from None
            base, config = find_config(adapter.base, adapter.revision, trust_remote_code, adapted_by=model_id)
            return replace(base, id=checkpoint.id, adapter=adapter), config
        if (sibling := meta_sibling(model_id)) is None:
            raise
    if revision is not None:
        raise ModelError(
            f"{model_id} has Meta's own layout, which transformers does not read: "
            f"use {sibling}, which has revisions of its own, without --revision {revision}"
        )
    warnings.warn(
        f"{model_id} has Meta's own layout, which transformers does not read: using {sibling}, the same model",
        stacklevel=3,
    )
    checkpoint = Checkpoint(sibling, sibling, None, trust_remote_code)
    return checkpoint, _load_config(checkpoint)


def _load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    try:
        with quietly():
            if checkpoint.gguf is not None and torchless.is_hidden():
                config = AutoConfig.for_model(**gguf_settings(read_header(checkpoint.path)))
            else:
                _check_layers(checkpoint)
                config = AutoConfig.from_pretrained(checkpoint.source, **checkpoint.options)
    except UNREADABLE as error:
        if checkpoint.gguf is not None:
            raise ModelError(
                f"cannot load {checkpoint.id}: {first_sentence(error)}; transformers does not read every GGUF file: "
                "give the folder or hub id of the model that it was made from"
            ) from error
        raise ModelError(f"cannot load {checkpoint.id}: {explain(checkpoint.id, error)}") from error
    config = without_speech(config)
    if find_loader(config) is None:
        raise ModelError(f"{checkpoint.id} is no causal language model, but of type {config.model_type}")
    if not isinstance(config.get_text_config(decoder=True), PreTrainedConfig):
        raise ModelError(
            f"{checkpoint.id} has a configuration inside its config.json that models of type {config.model_type} do "
            "not have: correct that file"
        )
    check_decoder(config, checkpoint.id)
    # A checkpoint may ask for an attention that is not installed, or is a kernel to be fetched from the hub.
    config._attn_implementation = None
    for each in (config, config.get_text_config(decoder=True)):
        each.return_dict = True  # what a forward returns is decided here, whatever the checkpoint asks for
        each.output_attentions = each.output_hidden_states = False
    return config


def _check_layers(checkpoint: Checkpoint) -> None:
    """Raise ModelError for more layers than any model has, of which transformers would make lists without end.

    Only of a model in a folder; a file that cannot be read is transformers' to judge.
    """
    file = checkpoint.path / "config.json"
    try:
        pending = [json.loads(file.read_bytes())]
    except (OSError, ValueError, RecursionError):
        return
    while pending:
        settings = pending.pop()
        if isinstance(settings, dict):
            pending += settings.values()
            for name, value in settings.items():
                if name.endswith(("_layer", "layers")) and isinstance(value, int | float) and value > MAX_LAYERS:
                    raise ModelError(
                        f"{checkpoint.id} has {value:.6g} as its {name}; expected at most {MAX_LAYERS}: correct its "
                        "config.json"
                    )


def check_decoder(config: PreTrainedConfig, model_id: str) -> None:
    """Raise ModelError for an encoder or an encoder-decoder, as far as the configuration tells."""
    if getattr(config, "is_encoder_decoder", False) or config.model_type in PARTS_OF_ENCODER_DECODERS:
        raise ModelError(
            f"{model_id} is an encoder-decoder ({config.model_type}): kvmix takes decoder-only language models"
        )
    classes = getattr(config, "architectures", None) or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ModelError(
            f"{model_id} has {str(classes)[:MAX_SHOWN]} as its architectures; expected a list with the name of a "
            "class: correct its config.json"
        )
    decodes = any(name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for name in classes)
    if classes and not decodes and getattr(config, "is_decoder", True) is False:
        raise ModelError(f"{model_id} is an encoder ({classes[0]}): kvmix takes decoder-only language models")


@contextmanager
def quietly(*, without_bars: bool = False) -> Iterator[None]:
    """Silence transformers' log and its bar over weights, unless `kvmix -v`. Downloads keep theirs.

    Args:
        without_bars: silence bars that no setting turns off, too, as that over the weights of a GGUF file.
    """
    bars = transformers_logging.is_progress_bar_enabled()
    nowhere = nullcontext() if verbose() or not without_bars else redirect_stderr(io.StringIO())
    with hushed(), nowhere:
        if not verbose():
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
