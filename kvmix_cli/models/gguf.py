"""GGUF files, the format of llama.cpp: configuration, tokenizer and weights, which transformers unpacks."""

from __future__ import annotations

import importlib.util
import math
import mmap
import struct
from pathlib import Path

from ..errors import ModelError, first_sentence

SUFFIX = ".gguf"
PACKAGES = ("gguf", "accelerate")
"""Packages that transformers needs to read them."""
VERSIONS = (2, 3)
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of metadata, by its kind."""
STRING, ARRAY = 8, 9
PREFERRED = "model.gguf"
"""The file that is taken of a folder with several."""


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
    lacking = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if lacking:
        raise ModelError(f"reading {file} needs {' and '.join(lacking)}: pip install 'kvmix[gguf]'")
    try:
        needed, size = _needed_bytes(file), file.stat().st_size
    except (ArithmeticError, LookupError, MemoryError, OSError, ValueError, struct.error) as error:
        raise ModelError(
            f"{file} is no GGUF file, or is cut off ({first_sentence(error)}): download it again"
        ) from error
    if size < needed:
        raise ModelError(f"{file} is cut off: it has {size} of {needed} bytes; download it again")


def _needed_bytes(file: Path) -> int:
    """Return the bytes that a file has according to its header.

    The package's own reader makes an array of every token of the vocabulary, which takes seconds; here they are
    stepped over. Layout: docs/gguf.md of ggml.
    """
    from gguf import GGML_QUANT_SIZES, GGUF_MAGIC, GGMLQuantizationType

    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, tensors, values = struct.unpack_from("<IIQQ", data, 0)
        if magic != GGUF_MAGIC or version not in VERSIONS:
            raise ValueError(f"it begins with {data[:8].hex()}")
        at, alignment = 24, 32
        for _ in range(values):
            key, (kind,) = (
                data[at + 8 : _after_string(data, at)],
                struct.unpack_from("<I", data, _after_string(data, at)),
            )
            at = _after_string(data, at) + 4
            if key == b"general.alignment":
                (alignment,) = struct.unpack_from("<I", data, at)
            at = _after_value(data, at, kind)
        end = 0
        for _ in range(tensors):
            at = _after_string(data, at)
            (dimensions,) = struct.unpack_from("<I", data, at)
            shape = struct.unpack_from(f"<{dimensions}Q", data, at + 4)
            form, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dimensions)
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(form)]
            at += 16 + 8 * dimensions
            end = max(end, offset + math.prod(shape) // block * size)
        return -(-at // alignment) * alignment + end


def _after_string(data: mmap.mmap, at: int) -> int:
    return int(at + 8 + struct.unpack_from("<Q", data, at)[0])


def _after_value(data: mmap.mmap, at: int, kind: int) -> int:
    """Return where a value of metadata ends. Raises KeyError for an unknown kind, struct.error after the end."""
    if kind == STRING:
        return _after_string(data, at)
    if kind != ARRAY:
        return at + WIDTHS[kind]
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in WIDTHS:
        return int(at + count * WIDTHS[kind])
    for _ in range(count):
        at = _after_value(data, at, kind)
    return at
