"""lm-eval's index of its task files: entries of tasks, groups and tags by name.

lm-eval reads all of its 14 000 files for it, which takes 8 seconds. A search of their text takes half a second, and
says which folders can have a name.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from .boundary import quiet

FOLDER = Path(lm_eval.tasks.__file__).parent
_DEFINED = re.compile(rb"""^["']?(?:task|group)["']?:[ \t]*["']?([^\s"'#\[{]+)""", re.MULTILINE)

_LETTER = r"[\w.-]"

Index = dict[str, Any]
"""Entries of lm-eval by the name of a task, a group or a tag."""


@functools.cache
def folder_index(folder: Path) -> Index:
    """Return the entries of the files in a folder and below."""
    with quiet():
        return dict(TaskManager(include_path=str(folder), include_defaults=False).task_index)


def index_around(names: Iterable[str]) -> Index:
    """Return the entries of those folders of lm-eval's that mention a name; of other names there may be more.

    Args:
        names: names, or patterns of names such as `ruler_*`.
    """
    words = "|".join(_as_regex(name) for name in sorted(names))
    mention = re.compile(f"(?<!{_LETTER})(?:{words})(?!{_LETTER})".encode())
    folders = {folder for folder, texts in _texts().items() if any(mention.search(text) for text in texts)}
    found: Index = {}
    for folder in sorted(_outermost(folders)):
        for name, entry in folder_index(folder).items():
            known: Any = found.get(name, entry)
            found[name] = replace(known, tags=known.tags | entry.tags) if known.kind.name == "TAG" else known
    return found


def is_pattern(name: str) -> bool:
    """Return whether a name stands for all names that are like it."""
    return any(character in name for character in "*?[")


@functools.cache
def defined_names() -> tuple[str, ...]:
    """Return the names of tasks and groups that lm-eval's files define."""
    found = (match.decode() for texts in _texts().values() for text in texts for match in _DEFINED.findall(text))
    return tuple(dict.fromkeys(found))


@functools.cache
def _texts() -> dict[Path, list[bytes]]:
    """Return the texts of lm-eval's task files, and of what they include, by folder."""
    found: dict[Path, list[bytes]] = {}
    for folder, _, files in os.walk(FOLDER):
        paths = [Path(folder, file) for file in files if not file.endswith((".py", ".pyc", ".md"))]
        found[Path(folder)] = [path.read_bytes() for path in paths]
    return found


def _outermost(folders: set[Path]) -> list[Path]:
    """Return the folders that are in no other: lm-eval reads those below as well."""
    return [folder for folder in folders if folders.isdisjoint(folder.parents)]


def _as_regex(name: str) -> str:
    """Return a regular expression of all names that a pattern stands for, and perhaps others."""
    return f"{_LETTER}*".join(re.escape(part) for part in re.split(r"\*|\?|\[[^]]*\]", name))
