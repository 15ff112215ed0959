"""Content of tensor files that a plan names by their checksum, as bases and codebooks are read. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path


def read_content(path: Path) -> bytes:
    """Return the content of a file. Raises ValueError with the reason if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        raise ValueError("there is no such file" if is_missing else error.strerror or str(error)) from error


def check_content(content: bytes, sha256: str) -> None:
    """Raise ValueError with both checksums if this is another file than the plan was made with."""
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"its checksum is {found[:12]}..., and the plan was made with {sha256[:12]}...")
