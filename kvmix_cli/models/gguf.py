"""GGUF files, the format of llama.cpp: configuration, tokenizer and weights, which transformers unpacks. No torch."""

from __future__ import annotations

import importlib.util
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import torchless
from ..errors import ModelError, first_sentence

SUFFIX = ".gguf"
PACKAGES = ("gguf", "accelerate")
"""Packages that transformers needs to read them."""
VERSIONS = (2, 3)
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Form of a value of metadata, by its kind, as `struct` names it."""
STRING, ARRAY = 8, 9
PREFERRED = "model.gguf"
"""The file that is taken of a folder with several."""
MODEL_TYPES = {
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
"""transformers' names of architectures, where they are not llama.cpp's own."""
TEXT_ONLY = {"gemma3": "gemma3_text", "gemma4": "gemma4_text"}
"""Architectures of which a file holds the text part alone."""


@dataclass(frozen=True)
class GgufHeader:
    """The beginning of a GGUF file.

    Attributes:
        metadata: values by key; of an array of texts, such as the vocabulary, its length alone.
        tensors: elements and bytes of every tensor, by name.
        size: bytes of the whole file.
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, int]]
    size: int


def find_gguf(model_id: str, path: Path) -> Path | None:
    """Return the GGUF file that a path means: itself, or the one in a folder; None if there is none.

    Raises:
        ModelError: if a folder has several, or the file is missing.
    """
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        if not path.is_file():
            raise ModelError(
                f"no file {model_id}: give a GGUF file that is on this machine, its folder, or the hub id of the model "
                "that it was made from"
            )
        return path
    if not path.is_dir():
        return None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX and file.is_file())
    if len(found) > 1 and path / PREFERRED not in found:
        some = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
        raise ModelError(f"{model_id} holds {len(found)} GGUF files ({some}): give one of them, such as {found[0]}")
    return path / PREFERRED if len(found) > 1 else next(iter(found), None)


def check_gguf(file: Path) -> None:
    """Raise ModelError if a file cannot be read: a package is missing, or it is cut off or damaged."""
    needed, size = read_header(file).size, file.stat().st_size
    if size < needed:
        raise ModelError(f"{file} is cut off: it has {size} of {needed} bytes; download it again")


def read_header(file: Path) -> GgufHeader:
    """Return the beginning of a GGUF file. Raises ModelError if a package is missing, or it cannot be read."""
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise ModelError(f"reading {file} needs {' and '.join(lacking)}: pip install 'kvmix[gguf]'")
    try:
        return _header(file)
    except (ArithmeticError, LookupError, MemoryError, OSError, RecursionError, ValueError, struct.error) as error:
        ends_early = isinstance(error, struct.error)
        why = f"it ends within its header, at byte {file.stat().st_size}" if ends_early else first_sentence(error)
        raise ModelError(f"{file} is no GGUF file, or is cut off ({why}): download it again") from error


def gguf_settings(header: GgufHeader) -> dict[str, Any]:
    """Return the configuration of a GGUF file as transformers makes it, as far as it shapes the cache.

    transformers itself reads most files with torch, and every text of the vocabulary, which takes seconds.

    Raises:
        TorchNeeded: for an architecture that transformers has no table of.
    """
    architecture = str(header.metadata.get("general.architecture"))
    try:
        from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    except ImportError as error:  # transformers before 5.23
        raise torchless.TorchNeeded(f"the architecture {architecture}") from error
    if architecture in GGUF_CONFIG_ARCHS:
        return dict(GGUF_CONFIG_ARCHS[architecture](header.metadata, tuple(header.tensors)))
    name = MODEL_TYPES.get(architecture, architecture)
    if architecture == "llama" and header.metadata.get("general.name") == "mistral":
        name = "mistral"
    if name not in GGUF_CONFIG_MAPPING:
        raise torchless.TorchNeeded(f"the architecture {architecture}")
    settings = {
        setting: header.metadata[f"{architecture}.{key}"]
        for key, setting in GGUF_CONFIG_MAPPING[name].items()
        if setting not in (None, -1) and f"{architecture}.{key}" in header.metadata
    }
    settings.setdefault("vocab_size", header.metadata.get("tokenizer.ggml.tokens"))
    defaults = GGUF_CONFIG_DEFAULTS_MAPPING.get(name) or {}
    return {**defaults, **settings, "model_type": TEXT_ONLY.get(name, name)}


def _header(file: Path) -> GgufHeader:
    """Read the beginning of a file: layout in docs/gguf.md of ggml.

    The package's own reader makes an array of every token of the vocabulary, which takes seconds; here they are
    stepped over.
    """
    from gguf import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType

    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, count, values = struct.unpack_from("<IIQQ", data, 0)
        if magic != GGUF_MAGIC or version not in VERSIONS:
            raise ValueError(f"it begins with {data[:8].hex()}")
        at, metadata = 24, {}
        for _ in range(values):
            key, at = _text(data, at)
            (kind,) = struct.unpack_from("<I", data, at)
            metadata[key], at = _value(data, at + 4, kind)
        end, tensors = 0, {}
        for _ in range(count):
            name, at = _text(data, at)
            (dimensions,) = struct.unpack_from("<I", data, at)
            elements = math.prod(struct.unpack_from(f"<{dimensions}Q", data, at + 4))
            form, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dimensions)
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(form)]
            at += 16 + 8 * dimensions
            tensors[name] = elements, elements // block * size
            end = max(end, offset + tensors[name][1])
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        return GgufHeader(metadata, tensors, -(-at // alignment) * alignment + end)


def _text(data: mmap.mmap, at: int) -> tuple[str, int]:
    """Return a text, and where it ends. Raises struct.error after the end of the file."""
    end = at + 8 + int(struct.unpack_from("<Q", data, at)[0])
    if end > len(data):
        raise struct.error
    return data[at + 8 : end].decode("utf-8", "replace"), end


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """Return a value of metadata, and where it ends. Raises KeyError for an unknown kind, struct.error at the end."""
    if kind == STRING:
        return _text(data, at)
    if kind != ARRAY:
        return struct.unpack_from(f"<{FORMATS[kind]}", data, at)[0], at + struct.calcsize(f"<{FORMATS[kind]}")
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in FORMATS:
        form = f"<{count}{FORMATS[kind]}"
        return list(struct.unpack_from(form, data, at)), at + struct.calcsize(form)
    for _ in range(count):
        at = _after(data, at, kind)
    return count, at


def _after(data: mmap.mmap, at: int, kind: int) -> int:
    """Return where an element of an array ends, without reading it."""
    if kind == STRING:
        return int(at + 8 + struct.unpack_from("<Q", data, at)[0])
    return _value(data, at, kind)[1]
