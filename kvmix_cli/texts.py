"""Documents to calibrate on and to evaluate on, as plain strings.

    builtin                 the language reference and library sources that every Python carries
    FILE                    a text file is one document; a .jsonl file has one a line
    FOLDER                  every text file in it
    hub:NAME[:CONFIG[:SPLIT]]   a data set from the Hugging Face hub

The built-in text has two sides that never meet: what may be trained and calibrated on, and what is held out for
evaluation. The rule is `is_held_out_topic` and `HELD_OUT_MODULES`; the built-in model was trained by it too.
"""

from __future__ import annotations

import importlib
import json
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import TextError
from .noise import hushed

_HELD_OUT = (
    "argparse asyncio dataclasses decimal difflib fractions heapq ipaddress pathlib statistics subprocess textwrap "
    "tokenize typing unittest zipfile"
)
_CALIBRATION = (
    "ast calendar configparser csv email enum functools inspect json logging os pdb random shutil tarfile traceback"
)
HELD_OUT_MODULES = frozenset(_HELD_OUT.split())
CALIBRATION_MODULES = frozenset(_CALIBRATION.split())
MIN_CHARACTERS = 400
"""Library files shorter than this say little; the built-in text leaves them out."""
MAX_ROWS = 4096
"""Rows taken from a hub data set, chosen by seed. A profile needs tens of them."""

_HUB = "hub:"
_SNIFF = 8192


def load_texts(source: str = "builtin", *, held_out: bool = False, seed: int = 0) -> list[str]:
    """Documents of a source, in a fixed order; blank ones are left out.

    Args:
        source: `builtin`, a file, a folder, or `hub:NAME[:CONFIG[:SPLIT]]`.
        held_out: of the built-in text, the side that nothing was trained or calibrated on.
        seed: chooses the rows of a hub data set that has more than `MAX_ROWS`.

    Raises:
        TextError: if there is no text, or it cannot be read.
    """
    if source == "builtin":
        texts = builtin_texts(held_out=held_out)
    elif source.startswith(_HUB):
        texts = _hub_texts(source.removeprefix(_HUB), seed)
    else:
        texts = _path_texts(Path(source).expanduser())
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise TextError(f"no text in {source}: give a text file, a folder of them, a .jsonl file or hub:NAME")
    return texts


def is_held_out_topic(name: str) -> bool:
    """Whether a topic of the language reference (`pydoc_data.topics`) is held out for evaluation."""
    return zlib.crc32(name.encode()) % 4 == 0


def builtin_texts(*, held_out: bool) -> list[str]:
    """One side of the text that every Python installation carries: reference topics, then library modules."""
    modules = HELD_OUT_MODULES if held_out else CALIBRATION_MODULES
    return reference_topics(held_out=held_out) + [text for name in sorted(modules) for text in module_sources(name)]


def reference_topics(*, held_out: bool) -> list[str]:
    """One side of the language reference. Raises TextError if this Python lacks it.

    A few topics have the same text under several names. It counts once, and what any name puts on the training
    side is not held out.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise TextError("this Python has no pydoc_data.topics, the built-in text; name a file or folder") from error
    trained = {text for name, text in topics.items() if not is_held_out_topic(name)}
    distinct = dict.fromkeys(topics[name] for name in sorted(topics))
    return [text for text in distinct if (text not in trained) == held_out]


def module_sources(name: str) -> list[str]:
    """Sources of a standard-library module or package, one a file; empty where this Python has none."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    return [text for text in texts if len(text) >= MIN_CHARACTERS]


def _path_texts(path: Path) -> list[str]:
    if path.is_dir():
        return [text for file in _text_files(path) for text in _file_texts(file)]
    if not path.exists():
        raise TextError(f"no text at {path}: no such file or folder (a data set of the hub is hub:NAME)")
    return _file_texts(path)


def _text_files(folder: Path) -> Iterator[Path]:
    """Files below a folder that look like text, in order of their names; hidden ones are passed over."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and not _is_binary(path):
            yield path


def _file_texts(path: Path) -> list[str]:
    text = _read(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return [_parse_line(line, f"{path}, line {i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [text]


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(_SNIFF)
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


def _read(path: Path) -> str:
    if _is_binary(path):
        raise TextError(f"{path} is a binary file: give UTF-8 text")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error


def _parse_line(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TextError(f"{where}: not valid JSON ({error})") from error
    return _document(record, where)


def _document(record: Any, where: str) -> str:
    """The text of one record: `text`, `prompt` or `content`; else `context` and `input`, as in LongBench.

    Raises:
        TextError: if the record is no object, or has none of these as a string.
    """
    if not isinstance(record, dict):
        raise TextError(f"{where}: expected an object with a field 'text', got {type(record).__name__}")
    for name in ("text", "prompt", "content"):
        if isinstance(record.get(name), str):
            return record[name]
    parts = [record[name] for name in ("context", "input") if isinstance(record.get(name), str)]
    if not parts:
        found = ", ".join(map(str, record)) or "nothing"
        raise TextError(f"{where}: needs a text field text, prompt, content, context or input; it has {found}")
    return "\n\n".join(part for part in parts if part)


def _hub_texts(spec: str, seed: int) -> list[str]:
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    if not name:
        raise TextError("'hub:' names no data set: use hub:NAME[:CONFIG[:SPLIT]]")
    rows = _load_dataset(name, config or None, split or "train")
    if len(rows) > MAX_ROWS:
        rows = rows.shuffle(seed=seed).select(range(MAX_ROWS))
    return [_document(row, f"hub:{spec}, row {i}") for i, row in enumerate(rows)]


def _load_dataset(name: str, config: str | None, split: str) -> Any:
    import datasets

    try:
        with hushed():
            return datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise TextError(
            f"cannot load data set {name} (configuration {config or 'default'}, split {split}): {reason}; "
            "check the name and the network, or give a file"
        ) from error
