"""Files that are written whole or not at all: under a temporary name first, then renamed."""

from __future__ import annotations

import errno
import glob
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError

UNCHANGED = "; no file was changed"
STREAMS = (Path("/dev"), Path("/dev/fd"))
"""Folders whose links, such as /dev/stdout, stand for streams."""
UNFINISHED = ".unfinished"
"""End of the names of temporary files."""
ABANDONED_SECONDS = 24 * 60 * 60
"""Age of a temporary file that nobody is writing any more."""
SHOWN = 32
"""Characters of a file's name that its temporary one begins with; a name may have 255 bytes, and both are one."""


def is_device(path: Path) -> bool:
    """Return whether a path is a device, of which reading may have no end. Raises OSError if that cannot be told."""
    return path.is_char_device() or path.is_block_device()


def behind_links(path: Path) -> Path:
    """Return the file that a symbolic link leads to, or would lead to; a path that is no such link as it is.

    For files that a user names: one reads and writes through a link, as a shell does, and what is kept beside a file
    is beside the real one. Files that a command names itself replace links, which may be somebody else's.
    """
    place = Path(os.path.realpath(path))
    is_file = path.is_symlink() and not _is_stream(path) and (place.is_file() or not os.path.lexists(place))
    return place if is_file else path


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all, with its folders. Raises OutputError."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all, with its folders. Raises OutputError."""
    return write_parts(path, (data,))


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> Path:
    """Write a file of one part after the other, whole or not at all, with its folders. Raises OutputError."""
    try:
        _require_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as (file, name):
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            name.chmod(0o666 & ~_umask())
            name.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def safetensors_head(tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of a safetensors file, after which the data of its tensors follow one after the other.

    So a file is written, or its checksum taken, without a second copy of all tensors.

    Args:
        tensors: dtype as the format names it, shape and bytes of each tensor, in the order of their data. If wider
            dtypes come first, every tensor begins at a multiple of its element's size.
        metadata: of the file.
    """
    forms: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        start, end = end, end + size
        forms[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(forms, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file from its content. Raises ValueError, KeyError or TypeError."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header["__metadata__"]
    return metadata


def check_writable(path: Path) -> None:
    """Find out before any work, and without a trace, whether a file can be written. Raises OutputError."""
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        _require_file(path)
        with _temporary(folder / path.name):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _require_file(path: Path) -> None:
    """Raise OutputError for a device or pipe, which a rename would replace for everybody, and OSError for a folder.

    A user who may write to /dev, as in a container, would lose /dev/null.
    """
    if path == Path("-"):
        raise OutputError(f"cannot write to standard output here: name a file, or ./- for one of that name{UNCHANGED}")
    if not os.path.lexists(path):
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    is_special = path.exists() and not path.is_file()
    if is_special or _is_stream(path):
        raise OutputError(f"cannot write {path}: it is a device or a pipe; name a file{UNCHANGED}")


def _is_stream(path: Path) -> bool:
    """Return whether a path is a link that stands for a stream, such as /dev/stdout."""
    return path.is_symlink() and path.parent.resolve() in [each.resolve() for each in STREAMS]


@contextmanager
def after_saving(saved: str) -> Iterator[None]:
    """Within this block, an output that cannot be written says what is saved already. Raises OutputError.

    Args:
        saved: results and their place, and how to get the rest, such as `the profile is saved in profile.yaml`.
    """
    try:
        yield
    except OutputError as error:
        raise OutputError(f"{str(error).removesuffix(UNCHANGED)}; {saved}") from error


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a new file beside a path; it is removed unless it was renamed."""
    prefix = f".{path.name[:SHOWN]}."
    _remove_left(path.parent, prefix)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file, Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _remove_left(folder: Path, prefix: str) -> None:
    """Remove temporary files that killed processes have left, which can be as large as a cache of a long prompt."""
    for left in folder.glob(f"{glob.escape(prefix)}*{UNFINISHED}"):
        with suppress(OSError):  # another process has removed it, or may not be asked to
            if time.time() - left.lstat().st_mtime > ABANDONED_SECONDS:
                left.unlink()


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}{UNCHANGED}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
