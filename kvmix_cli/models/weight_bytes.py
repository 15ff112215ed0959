"""Bytes of a model's weights without loading them: from headers of files, from the hub, or from the architecture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from transformers import PreTrainedConfig

from .. import torchless
from ..errors import ModelError, first_sentence
from ..network import HUB_ERRORS
from .configuration import UNREADABLE, Checkpoint, quietly
from .gguf import read_header
from .multimodal import find_loader
from .weights import INDEXES, SINGLE, WEIGHT_BITS, read_headers, weight_files

FLOATS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8}
"""Bits of numbers that loading may bring into another dtype, by their names in safetensors files."""
INTEGERS = {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8}
"""Bits of those that stay as they are, such as the codes of quantized weights."""
GGUF = "GGUF"
ASK_SECONDS = 10
"""Seconds until the hub must have answered."""


@dataclass(frozen=True)
class WeightBytes:
    """Weights of a model.

    Attributes:
        by_dtype: elements and bytes, by dtype as safetensors files name it, or `GGUF` for the blocks of llama.cpp.
        source: where the numbers are from, in words.
    """

    by_dtype: Mapping[str, tuple[int, int]]
    source: str

    @property
    def total(self) -> int:
        """Return all bytes, as they are stored."""
        return sum(size for _, size in self.by_dtype.values())

    @property
    def parameters(self) -> int:
        """Return the number of elements."""
        return sum(elements for elements, _ in self.by_dtype.values())

    @property
    def is_fp8(self) -> bool:
        """Return whether most elements are fp8."""
        return max(self.by_dtype, key=lambda name: self.by_dtype[name][0], default="").startswith("F8_")

    def at(self, dtype: str | None) -> int:
        """Return the bytes with all floating-point weights in another dtype; None for the stored one."""
        if dtype is None:
            return self.total
        return sum(
            math.ceil(elements * WEIGHT_BITS[dtype] / 8) if name in (*FLOATS, GGUF) else size
            for name, (elements, size) in self.by_dtype.items()
        )


def find_weights(checkpoint: Checkpoint, config: PreTrainedConfig) -> WeightBytes:
    """Return the weights of a model.

    Raises:
        ModelError: if its files are damaged, or its architecture cannot be built.
        TorchNeeded: where torch is hidden, if they have to be counted from the architecture.
    """
    if checkpoint.gguf is not None:
        tensors = read_header(checkpoint.path).tensors.values()
        counts = sum(elements for elements, _ in tensors), sum(size for _, size in tensors)
        return WeightBytes({GGUF: counts}, "the header of the GGUF file")
    folder = checkpoint.path if checkpoint.path.is_dir() else _cached_folder(checkpoint)
    found = None if folder is None else _in_folder(folder, checkpoint.id, _dtype(config))
    if found is None and not checkpoint.path.is_dir():
        found = _on_the_hub(checkpoint)
    return found or _counted(config, checkpoint.id)


def _in_folder(folder: Path, model_id: str, dtype: str) -> WeightBytes | None:
    """Return the weights in a folder, None if it has none; of files that are not all there, what their index says."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if (folder / SINGLE).is_file() or index is not None:
        try:
            found = read_headers(weight_files(folder, model_id))
            if found:
                return WeightBytes(found, "the headers of the safetensors files")
        except (ModelError, ValueError):
            pass  # files that are missing, or are pointers of git-LFS
    if index is not None and (total := _total_size(index)) is not None:
        return WeightBytes({dtype: (8 * total // FLOATS[dtype], total)}, f"{index.name}")
    if sizes := [file.stat().st_size for file in folder.glob("pytorch_model*.bin")]:
        return WeightBytes({dtype: (8 * sum(sizes) // FLOATS[dtype], sum(sizes))}, "the sizes of the *.bin files")
    return None


def _total_size(index: Path) -> int | None:
    try:
        total = json.loads(index.read_bytes())["metadata"]["total_size"]
        return int(total) if int(total) > 0 else None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _cached_folder(checkpoint: Checkpoint) -> Path | None:
    """Return the folder of a hub model's files that are on this machine."""
    try:
        file = huggingface_hub.try_to_load_from_cache(checkpoint.source, "config.json", revision=checkpoint.revision)
    except HUB_ERRORS:
        return None
    return Path(file).parent if isinstance(file, str) else None


def _on_the_hub(checkpoint: Checkpoint) -> WeightBytes | None:
    """Return what the hub says about a model's safetensors; None if it says nothing, or cannot be asked."""
    try:
        info = huggingface_hub.model_info(checkpoint.source, revision=checkpoint.revision, timeout=ASK_SECONDS)
    except HUB_ERRORS:
        return None
    counts: Any = getattr(info.safetensors, "parameters", None) or {}
    bits = FLOATS | INTEGERS
    if not counts or not all(name in bits for name in counts):
        return None
    return WeightBytes({name: (count, count * bits[name] // 8) for name, count in counts.items()}, "the hub")


def _counted(config: PreTrainedConfig, model_id: str) -> WeightBytes:
    """Return the weights of a model that transformers builds of a configuration, without memory for them."""
    if torchless.is_hidden():
        raise torchless.TorchNeeded("weights that are in no file")
    import torch

    loader: Any = find_loader(config)
    try:
        with torch.device("meta"), quietly():
            model = loader.from_config(config)
    except UNREADABLE as error:
        raise ModelError(f"{model_id} cannot be built from its configuration: {first_sentence(error)}") from error
    elements = sum(parameter.numel() for parameter in model.parameters())
    dtype = _dtype(config)
    return WeightBytes({dtype: (elements, elements * FLOATS[dtype] // 8)}, "the architecture, counted with torch")


def _dtype(config: PreTrainedConfig) -> str:
    """Return the dtype of a configuration as safetensors files name it; float32 if it has none."""
    name = str(config.dtype or "float32").removeprefix("torch.")
    return {"bfloat16": "BF16", "float16": "F16", "float64": "F64"}.get(name, "F32")
