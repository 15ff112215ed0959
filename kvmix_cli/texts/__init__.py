"""Texts: documents to calibrate on and to evaluate on, as plain strings.

    builtin                     the language reference and library sources that every Python carries; to calibrate on,
                                as much ordinary prose beside them
    builtin-library             the same without the prose: text of the kind that the built-in model was trained on
    wikitext2[:PATH]            WikiText-2, its rows joined into one document; from the hub, or a file or folder of rows
    c4[:PATH]                   C4 in English, the first shard
    FILE                        a text file is one document; .jsonl, .json, .csv, .tsv, .parquet and .arrow have one a
                                record (see `records.py` for its fields; others are left out, and said)
    FOLDER                      all such files in it; a folder of `datasets.save_to_disk` is a data set
    hub:NAME[:CONFIG[:SPLIT]]   a data set from the Hugging Face hub, or a folder in its layout

Each of them has two sides where there can be: what may be trained and calibrated on, and what is held out for
evaluation. A data set's are its splits, unless one is named. Those of the built-in text never meet: the rule is
`is_held_out_topic` and `HELD_OUT_MODULES`; the built-in model was trained by it too.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from ..errors import FieldsLeftOut, TextError
from .builtin import (
    CALIBRATION_MODULES,
    HELD_OUT_MODULES,
    builtin_texts,
    is_held_out_topic,
    module_sources,
    prose,
    reference_topics,
)
from .files import path_texts, read_text
from .hub import HUB, hub_texts
from .named import find_named
from .records import collected_fields

__all__ = [
    "CALIBRATION_MODULES",
    "HELD_OUT_MODULES",
    "builtin_texts",
    "describe_texts",
    "is_held_out_topic",
    "is_one_document",
    "load_texts",
    "module_sources",
    "prose",
    "read_text",
    "reference_topics",
]

MAX_ROWS = 4096
"""Rows taken from a hub data set, chosen by seed. A profile needs tens of them."""


def load_texts(source: str = "builtin", *, held_out: bool = False, seed: int = 0) -> list[str]:
    """Return the documents of a source, in a fixed order; blank ones are left out.

    Args:
        source: see the head of this module.
        held_out: the side that nothing was trained or calibrated on. Of a data set without a named split: its test or
            validation split, if it has one.
        seed: chooses the rows of a hub data set that has more than `MAX_ROWS`.

    Raises:
        TextError: if there is no text, or it cannot be read.

    Warns:
        FieldsLeftOut: if records have fields that are not read.
    """
    with collected_fields() as fields:
        texts = [text for text in _load(source, held_out, seed) if text.strip()]
    if fields.left_out:
        warnings.warn(FieldsLeftOut(source, list(fields.read), list(fields.left_out)), stacklevel=2)
    if not texts:
        raise TextError(f"no text in {source}: give a text file, a folder of them, a .jsonl file or hub:NAME")
    return texts


def describe_texts(source: str, *, held_out: bool = False) -> str:
    """Return a source in words: the data set of a name, and anything else as it is."""
    named = find_named(source)
    return source if named is None else named.describe(held_out)


def is_one_document(source: str) -> bool:
    """Return whether a source is one long text by its name, so that samples of it are consecutive parts."""
    named = find_named(source)
    return named is not None and named.joined


def _load(source: str, held_out: bool, seed: int) -> list[str]:
    if source in ("builtin", "builtin-library"):
        return builtin_texts(held_out=held_out, with_prose=source == "builtin")
    if (named := find_named(source)) is not None:
        return named.load(held_out, seed)
    if source.startswith(HUB):
        return hub_texts(source.removeprefix(HUB), held_out, seed, MAX_ROWS)
    return path_texts(Path(source).expanduser(), held_out)
