"""The built-in text: the language reference and library sources that every Python carries, and prose.

The prose (`assets/prose`) was written for this project and is there to calibrate on only: what is held out is of the
reference and the library.
"""

from __future__ import annotations

import importlib
import sysconfig
import zlib
from itertools import pairwise
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
PARTS = 9
"""Documents that the reference, and the library, are joined into for calibration: half as many as there are of prose.
Samples are pieces of different documents, so that half of them are prose."""
_PROSE = Path(__file__).parent.parent / "assets" / "prose"


def is_held_out_topic(name: str) -> bool:
    """Return whether a topic of the language reference (`pydoc_data.topics`) is held out for evaluation."""
    return zlib.crc32(name.encode()) % 4 == 0


def builtin_texts(*, held_out: bool, with_prose: bool = True) -> list[str]:
    """Return one side of the built-in text: prose, the reference, then the library.

    Held out is no prose, and every topic and library file is a document. To calibrate on, they are joined (`PARTS`).

    Args:
        with_prose: put prose before the rest of what is calibrated on.

    Raises:
        TextError: if this Python lacks the reference.
    """
    topics = reference_topics(held_out=held_out)
    modules = sorted(HELD_OUT_MODULES if held_out else CALIBRATION_MODULES)
    sources = [text for name in modules for text in module_sources(name)]
    if held_out:
        return topics + sources
    return (prose() if with_prose else []) + _joined(topics) + _joined(sources)


def prose() -> list[str]:
    """Return the prose: a story, a letter, news, articles, instructions and others, a page or two each."""
    return [path.read_text(encoding="utf-8") for path in sorted(_PROSE.glob("*.txt"))]


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


def _joined(texts: list[str]) -> list[str]:
    """Return texts joined into `PARTS` documents of as many consecutive ones each, to one."""
    ends = [len(texts) * part // PARTS for part in range(PARTS + 1)]
    return ["\n\n".join(texts[start:end]) for start, end in pairwise(ends)]
