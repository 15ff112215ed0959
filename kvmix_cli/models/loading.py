"""Loading models: the only `from_pretrained` of the package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..cache.attention import register_attention
from ..cache.rotary import know_rotations
from ..errors import ModelError, TextError, first_sentence, is_out_of_memory
from ..garbage import look_again
from ..plan import ModelInfo
from ..ranks import ALONE, Ranks, current
from .adapters import merge_adapter
from .attention import set_attention, use_attention
from .causality import check_causal
from .configuration import UNREADABLE, Checkpoint, find_config, load_info, quietly
from .devices import SPREAD, find_device, find_dtype
from .geometry import max_length, model_info
from .multimodal import find_loader, load_processor
from .parts import check_shares, split_by, whole_sums
from .projections import packed_modules
from .sources import BUILTIN, has_pickles
from .weights import check_files

__all__ = ["LoadedModel", "load_info", "load_model"]

_TOKENIZER_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf", "tiktoken": "tiktoken"}
"""Packages that read older tokenizer formats, and the module of each."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_WORDS = "The answer is 1."
"""A text that a tokenizer is tried with: any vocabulary has some token for it."""

_NO_CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"
"""Environment variable of transformers."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, in evaluation mode.

    Attributes:
        model: a causal language model whose attention implementation is `kvmix` where its class allows one.
        tokenizer: its tokenizer.
        info: its layers and heads.
        max_length: tokens it was made for, None if unbounded.
        processor: makes inputs of images and text, if they were asked for.
        prefill_chunk: tokens of a prompt that are fed at a time, see `decoding.feed.fill`; None for all at once.
        ranks: the processes that measure with this model, each with a copy or with a part of it.
    """

    model: PreTrainedModel
    tokenizer: Any
    info: ModelInfo
    max_length: int | None
    processor: Any = None
    prefill_chunk: int | None = None
    ranks: Ranks = field(default=ALONE, compare=False)

    @property
    def device(self) -> torch.device:
        """Return the device of token ids; with a device map, other layers may live elsewhere."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def config(self) -> PreTrainedConfig:
        """Return the model's configuration."""
        return self.model.config

    @property
    def dtype(self) -> str:
        """Return the name of the weights' dtype: `float32`, `bfloat16` or `float16`."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens that the embedding has."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def check_ids(self, rows: Iterable[Sequence[int]]) -> None:
        """Raise TextError for a token id that the embedding does not have, such as that of an added padding token."""
        last = self.vocabulary - 1
        for row in rows:
            if row and (largest := max(row)) > last:
                raise TextError(
                    f"the text has token {largest} ({self.tokenizer.decode([largest])!r}), and the embedding of "
                    f"{self.info.id} ends at {last}: leave that token out, or use the tokenizer that the model was "
                    "trained with"
                )


def load_model(
    model_id: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    attention: str = "kvmix",
    reads_images: bool = False,
    tensor_parallel: bool = False,
) -> LoadedModel:
    """Load a model with its tokenizer. Under torchrun every rank loads a copy of it, or its part.

    Args:
        model_id: hub id, local folder or `builtin:tiny`.
        dtype: `auto` (the checkpoint's; float32 for a builtin model on the CPU), float32, bfloat16 or float16,
            by its name or as torch has it.
        device: `auto` (CUDA if there is any), `map` (spread over all devices by accelerate), or a torch device.
        trust_remote_code: run code that comes with the model.
        allow_pickle: take pickled weights (`*.bin`) where there are no safetensors.
        attention: attention implementation; a class that rejects it keeps its own, with a warning.
        reads_images: also load what reads images, with its processor.
        tensor_parallel: load this rank's part, by the plan that transformers has for the model's class.

    Raises:
        ModelError: if it cannot be loaded as asked, has nothing to quantize, or does not decode from a cache.
    """
    look_again()  # from here on tensors are made, which must not outlast their use
    ranks = current().sharded() if tensor_parallel else current()
    device, wanted = find_device(str(device), ranks), find_dtype(dtype)
    checkpoint, config = find_config(str(model_id), revision, trust_remote_code)
    info = model_info(config, checkpoint.id, checkpoint.revision)
    if tensor_parallel:
        check_shares(info, ranks)
    is_builtin = checkpoint.id.startswith(BUILTIN)
    if wanted == "auto" and is_builtin and device == "cpu":
        wanted = torch.float32
    if (folder := Path(checkpoint.source)).is_dir():
        check_files(folder, checkpoint.id)
    tokenizer = _load_tokenizer(checkpoint)
    processor = _load_processor(checkpoint, config) if reads_images else None
    options = {"reads_images": reads_images, "use_safetensors": not allow_pickle or None, "dtype": wanted}
    model = _load_placed(checkpoint, config, device, ranks, **options)
    model.eval()
    _check_vocabulary(tokenizer, model, checkpoint.id)
    register_attention()
    if is_builtin:
        set_attention(model, attention)
    else:
        use_attention(model, attention, info, check_causal(model, checkpoint.id, info))
    know_rotations(model)
    return LoadedModel(model, tokenizer, info, max_length(config), processor, ranks=ranks)


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.source, **checkpoint.options)
            ids = tokenizer(_WORDS, add_special_tokens=False).input_ids
    except UNREADABLE as error:
        if any((Path(checkpoint.source) / name).is_file() for name in _TOKENIZER_FILES):
            raise ModelError(
                f"{checkpoint.id} has a tokenizer that cannot be used ({first_sentence(error)}): get "
                f"{' and '.join(_TOKENIZER_FILES)} again"
            ) from error
        lacking = [name for name, module in _TOKENIZER_PACKAGES.items() if not _is_installed(module)]
        older = f", or for an older format `pip install {' '.join(lacking)}`" if lacking else ""
        reason = "" if lacking else f" ({first_sentence(error)})"
        raise ModelError(
            f"{checkpoint.id} has no tokenizer that can be loaded{reason}: it needs tokenizer.json{older}"
        ) from error
    if not ids:  # transformers makes an empty one where the files of a vocabulary are missing
        raise ModelError(f"{checkpoint.id} has a tokenizer without a vocabulary: it needs tokenizer.json")
    return tokenizer


def _load_processor(checkpoint: Checkpoint, config: PreTrainedConfig) -> Any:
    with quietly():
        return load_processor(checkpoint.source, checkpoint.id, config, **checkpoint.options)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _load_placed(
    checkpoint: Checkpoint, config: PreTrainedConfig, device: str, ranks: Ranks, **options: Any
) -> PreTrainedModel:
    """Load weights, with those of an adapter, onto a device, spread over all of them, or this rank's part.

    Args:
        ranks: those that have a part each, if they are sharded.
        options: of `_load_weights`.
    """
    placement = split_by(ranks) if ranks.is_sharded else {"device_map": "auto"} if device == SPREAD else {}
    with whole_sums() if ranks.is_sharded else nullcontext():
        model = _load_weights(checkpoint, config, **options, **placement)
    if checkpoint.adapter is not None:
        model = merge_adapter(model, checkpoint.adapter, checkpoint.id)
    return model if device == SPREAD or ranks.is_sharded else _move(model, checkpoint.id, device)


def _load_weights(
    checkpoint: Checkpoint, config: PreTrainedConfig, *, reads_images: bool, **options: Any
) -> PreTrainedModel:
    loader: Any = find_loader(config, reads_images=reads_images)
    try:
        with quietly(without_bars=checkpoint.gguf is not None), _without_conversion():
            model, report = loader.from_pretrained(
                checkpoint.source,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **checkpoint.options,
                **options,
            )
    except (*UNREADABLE, MemoryError) as error:
        if is_out_of_memory(error):
            raise ModelError(
                f"{checkpoint.id} does not fit on the device: use a smaller model or --device map"
            ) from error
        if options["use_safetensors"] and isinstance(error, OSError) and has_pickles(checkpoint.source):
            raise ModelError(
                f"{checkpoint.id} has pickled weights (*.bin) and no safetensors, and a pickle can hold code: take a "
                "version with *.safetensors, or add --allow-pickle if you trust its author"
            ) from error
        if isinstance(error, KeyError) and (name := _setting_of(config.to_dict(), *error.args[:1])) is not None:
            raise ModelError(
                f"config.json of {checkpoint.id} has {name} {error.args[0]!r}, which this transformers does not know: "
                "correct it there, or use a newer transformers"
            ) from error
        raise ModelError(f"cannot load the weights of {checkpoint.id}: {first_sentence(error)}") from error
    _require_complete(checkpoint.id, report)
    if checkpoint.gguf is not None and not packed_modules(model):
        model.hf_quantizer, model.is_quantized = None, False  # its weights have been unpacked: it is a dense model
    return model


def _setting_of(settings: dict[str, Any], value: object) -> str | None:
    """Return the name of the setting, also of one inside another, that has a value; None if none has it."""
    for name, each in settings.items():
        if isinstance(each, dict) and (inside := _setting_of(each, value)) is not None:
            return f"{name}.{inside}"
        if isinstance(each, str) and each == value:
            return str(name)
    return None


def _require_complete(model_id: str, report: dict[str, Any]) -> None:
    """Raise ModelError for a checkpoint that lacks weights: transformers would fill them with random numbers."""
    mismatched = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    for names, fault in ((set(report["missing_keys"]), "lacks"), (mismatched, "has in another shape")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ModelError(f"{model_id} {fault} {len(names)} of the weights that its config.json asks for: {some}")


def _check_vocabulary(tokenizer: Any, model: PreTrainedModel, model_id: str) -> None:
    """Raise ModelError if the tokenizer gives token ids that the embedding does not have.

    Tokens that were added to a vocabulary, such as a padding token, may be beyond it: ordinary text has none of them.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    beyond = sorted(set(tokenizer.get_vocab().values()) - added - set(range(rows)))
    if beyond:
        raise ModelError(
            f"the tokenizer of {model_id} gives token ids up to {beyond[-1]}, its embedding ends at {rows - 1}: "
            "use the tokenizer that the model was trained with"
        )


def _move(model: PreTrainedModel, model_id: str, device: str) -> PreTrainedModel:
    try:
        return model.to(device)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ModelError(f"{model_id} does not fit on {device}: use a smaller model or --device map") from error
        raise ModelError(f"cannot move {model_id} to {device}: {first_sentence(error)}") from error


@contextmanager
def _without_conversion() -> Iterator[None]:
    """Keep transformers from asking the hub's conversion service for safetensors of a model that has none."""
    before = os.environ.get(_NO_CONVERSION)
    os.environ[_NO_CONVERSION] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_CONVERSION]
        else:
            os.environ[_NO_CONVERSION] = before
