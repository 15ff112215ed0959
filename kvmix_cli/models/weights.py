"""Files of a local model folder, checked before any of them is loaded."""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..journal import refuse_constant

WEIGHT_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8": 8, "int8": 8, "int4": 4}
"""Bits of a weight by the name of its dtype; scales of quantized weights are not counted."""
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Files that say which shard holds which weight; the first that is there is read."""
SINGLE = "model.safetensors"
GENERATION = "generation_config.json"
LOADED = ("*.safetensors", "*.bin", "*.index.json", "tokenizer*", "*.model")
"""Files that loading may read."""
POINTER = b"version https://git-lfs.github.com/spec"
"""First bytes of a file that git-LFS has not fetched."""
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header, little-endian."""
MAX_HEADER = 100_000_000


def check_files(folder: Path, model_id: str) -> None:
    """Check the files of a model folder before they are loaded.

    Raises:
        ModelError: for files that git-LFS has not fetched, shards that are missing or outside, weights that are cut or
            damaged, and settings of generation that cannot be read, of which transformers would take none.
    """
    pointers = sorted({path.name for pattern in LOADED for path in folder.glob(pattern) if _is_pointer(path)})
    if pointers:
        raise ModelError(
            f"{model_id} has {_some(pointers)} only as git-LFS pointers, not the contents: "
            "run `git lfs pull` in the folder"
        )
    for path in weight_files(folder, model_id):
        size, whole = path.stat().st_size, _whole_size(path)
        if size != whole:
            found = "has no tensors that can be read" if whole is None else f"has {size} of {whole} bytes"
            raise ModelError(f"cannot load the weights of {model_id}: {path.name} {found}; get the file again")
    if (folder / GENERATION).is_file() and not _is_object(folder / GENERATION):
        raise ModelError(f"{GENERATION} of {model_id} is no JSON object: correct it, or take it away")


def read_headers(files: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Return elements and bytes of all tensors in safetensors files, by dtype as the files name it (`BF16`).

    Raises:
        ValueError: if a file has no header that can be read.
    """
    found: dict[str, tuple[int, int]] = {}
    for path in files:
        header = _header(path)
        if header is None:
            raise ValueError(f"{path.name} has no header")
        for entry in header[1].values():
            elements, size = found.get(entry["dtype"], (0, 0))
            first, last = entry["data_offsets"]
            found[entry["dtype"]] = elements + math.prod(entry["shape"]), size + last - first
    return found


def weight_files(folder: Path, model_id: str) -> Iterator[Path]:
    """Yield the safetensors files that would be loaded. Raises ModelError for a faulty index."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if (folder / SINGLE).is_file():
        yield folder / SINGLE
        return
    if index is None:
        return
    shards = _shards(index, model_id)
    outside = [name for name in shards if _leads_outside(name)]
    if outside:
        raise ModelError(
            f"{index.name} of {model_id} names {_some(outside)}, which is not inside the folder: do not trust it"
        )
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"cannot load the weights of {model_id}: {len(missing)} of {len(shards)} files that {index.name} names are "
            f"missing: {_some(missing)}; get them, too"
        )
    yield from (folder / name for name in shards if name.endswith(".safetensors"))


def _shards(index: Path, model_id: str) -> list[str]:
    """Return the names of files in an index, each once."""
    try:
        data = json.loads(index.read_bytes(), parse_constant=refuse_constant)
        return sorted({posixpath.join("", name) for name in data["weight_map"].values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index.name} of {model_id} is damaged: expected a `weight_map` from weights to files; get the file again"
        ) from error


def _is_object(path: Path) -> bool:
    """Return whether a file holds a JSON object."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _leads_outside(name: str) -> bool:
    """Return whether a name is anything but a path that stays below its folder, on any system."""
    path = posixpath.normpath(str(name).replace("\\", "/"))
    return path.startswith(("/", "..")) or ":" in path or "\0" in path or path == "."


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def _whole_size(path: Path) -> int | None:
    """Return the bytes that a safetensors file should have by its header; None if it has no header that can be read."""
    header = _header(path)
    return None if header is None else header[0] + max(entry["data_offsets"][1] for entry in header[1].values())


def _header(path: Path) -> tuple[int, dict[str, Any]] | None:
    """Return where the data of a safetensors file begins, and its tensors; None if they cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header = json.loads(file.read(length)) if 0 < length <= MAX_HEADER else {}
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for entry in tensors.values():
            entry["data_offsets"] = [int(offset) for offset in entry["data_offsets"]]
            _ = entry["data_offsets"][1]
        return (LENGTH_BYTES + length, tensors) if tensors else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
