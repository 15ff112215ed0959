"""Python files of a user's own, named by `--import`: they register scores, codecs, transforms or probes."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path

from .errors import ExtensionError, class_and_sentence

_LOADED: dict[Path, str] = {}
"""Files that have been run, with the SHA-256 of each."""


def load_extension(path: Path) -> None:
    """Run a Python file, once in a process.

    Raises:
        ExtensionError: if it is missing, or raises whatever it may, such as for a name that is registered already.
    """
    file = path.resolve()
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ExtensionError(f"--import {path}: cannot be read: {error.strerror}; name a Python file") from error
    if _LOADED.get(file) == digest:
        return
    name = f"kvmix_extension_{digest[:8]}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ExtensionError(f"--import {path}: is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for the module of a class
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        sys.modules.pop(name)
        raise ExtensionError(f"--import {path}{_line(error, file)}: {class_and_sentence(error)}") from error
    _LOADED[file] = digest


def loaded_extensions() -> dict[str, str]:
    """Return the names of all files that have been run, with their checksums: numbers depend on them."""
    return {file.name: digest for file, digest in sorted(_LOADED.items())}


def extension_error(error: BaseException) -> ExtensionError | None:
    """Return an error that came from a file that was run, as one that names its line; None for any other error."""
    for file in _LOADED:
        if line := _line(error, file):
            found = ExtensionError(f"--import {file.name}{line}: {class_and_sentence(error)}")
            found.__cause__ = error  # for --traceback
            return found
    return None


def _line(error: BaseException, file: Path) -> str:
    """Return `, line 9`, the last place in a file that an error came from; empty if it came from none."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f", line {lines[-1]}" if lines else ""
