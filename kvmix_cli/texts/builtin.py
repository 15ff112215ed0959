"""The built-in text, which every Python installation carries: its language reference and sources of its library."""

from __future__ import annotations

import importlib
import sysconfig
import zlib
from pathlib import Path

from ..errors import TextError

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
"""Library files shorter than this are left out."""


def is_held_out_topic(name: str) -> bool:
    """Return whether a topic of the language reference (`pydoc_data.topics`) is held out for evaluation."""
    return zlib.crc32(name.encode()) % 4 == 0


def builtin_texts(*, held_out: bool) -> list[str]:
    """Return one side of the built-in text: reference topics, then library modules."""
    modules = HELD_OUT_MODULES if held_out else CALIBRATION_MODULES
    return reference_topics(held_out=held_out) + [text for name in sorted(modules) for text in module_sources(name)]


def reference_topics(*, held_out: bool) -> list[str]:
    """Return one side of the language reference. Raises TextError if this Python lacks it.

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
    """Return the sources of a standard-library module or package, one a file; none where this Python has none."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    return [text for text in texts if len(text) >= MIN_CHARACTERS]
