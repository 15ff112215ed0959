"""The compiled library on disk, and the checks that it passes before it is loaded.

    KVMIX_CACHE_DIR/kvmix-<key of sources, flags and compiler>/     0700
        library-<start of its checksum>.so
        stamp                                                       its name, size in bytes and SHA-256

A library is loaded only from a folder that nobody but its owner can write, and only if it is what the stamp says. Both
files are written and synchronised elsewhere and then renamed, the stamp last: another process, or the next one after a
crash, sees a whole library or none. The file's name is unique to its contents, because a process that has loaded a
library is given the same one again for the same name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from .build import BuildError, build_key, compile_library

STAMP = "stamp"
BUILDING = ".building-"
"""Start of the names of folders in which a library is compiled."""
ABANDONED_SECONDS = 60 * 60
"""Age of such a folder in which nobody compiles any more; it takes a minute at most."""


class LibraryError(Exception):
    """A compiled library that must not be used; the message says why, in one line."""


def cache_dir() -> Path:
    """Return the folder for compiled libraries.

    It is `KVMIX_CACHE_DIR`, or `kvmix` in `XDG_CACHE_HOME`, or in `~/.cache`, or, where there is no home or it cannot
    be written, a folder of this user's own among the temporary files.
    """
    if given := os.environ.get("KVMIX_CACHE_DIR"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "kvmix"
    try:
        folder = Path.home() / ".cache" / "kvmix"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        folder = Path()
    if folder.is_absolute() and (folder.is_dir() or _can_be_made(folder)):
        return folder
    return Path(tempfile.gettempdir()) / f"kvmix-{os.geteuid()}"


def entry(isa: str) -> Path:
    """Return the folder of the library for an instruction set, which may not exist yet."""
    return cache_dir() / f"kvmix-{build_key(isa)}"


def find(folder: Path) -> Path:
    """Return the path of the library in an entry's folder.

    Raises:
        OSError: if there is no such folder, or it cannot be read.
        LibraryError: if somebody else may have written it, or the library is not what its stamp says.
    """
    _check_private(folder)
    try:
        _check_private(folder / STAMP)
        name, size, checksum = (folder / STAMP).read_text().split()
        library = folder / Path(name).name
        _check_private(library)
        contents = library.read_bytes()
    except FileNotFoundError as error:
        raise LibraryError(f"{error.filename} is missing") from error
    except ValueError as error:
        raise LibraryError(f"{folder / STAMP} is no stamp of a library") from error
    if str(len(contents)) != size:
        raise LibraryError(f"{library} has {len(contents)} bytes instead of {size}")
    if hashlib.sha256(contents).hexdigest() != checksum:
        raise LibraryError(f"{library} does not have the checksum of its stamp")
    return library


def install(isa: str) -> Path:
    """Compile the library for an instruction set into its folder, in place of what is there, and return its path.

    Several processes may do so at once: the last stamp wins, and every one finds a whole library.

    Raises:
        BuildError: if it cannot be compiled, or the cache cannot be written.
        LibraryError: if what another process has put there meanwhile must not be used.
    """
    folder = entry(isa)
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_left(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=BUILDING) as scratch:
            library = _named_by_checksum(compile_library(Path(scratch), isa))
            stamp = _stamp_of(library)
            for path in (library, stamp):
                _synchronise(path)
            _make_private(folder)
            for path in (library, stamp):
                path.replace(folder / path.name)
                _synchronise(folder)
        _synchronise(folder.parent)
    except OSError as error:
        reason = error.strerror or error
        raise BuildError(f"{error.filename or folder} cannot be written ({reason}); set KVMIX_CACHE_DIR") from error
    return find(folder)


def _remove_left(folder: Path) -> None:
    """Remove folders in which processes were compiling when they were killed."""
    for left in folder.glob(f"{BUILDING}*"):
        with suppress(OSError):  # another process has removed it, or it is somebody else's
            if time.time() - left.lstat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left)


def _named_by_checksum(compiled: Path) -> Path:
    checksum = hashlib.sha256(compiled.read_bytes()).hexdigest()
    library = compiled.rename(compiled.parent / f"library-{checksum[:16]}.so")
    library.chmod(0o700)
    return library


def _stamp_of(library: Path) -> Path:
    contents, stamp = library.read_bytes(), library.parent / STAMP
    stamp.write_text(f"{library.name} {len(contents)} {hashlib.sha256(contents).hexdigest()}\n")
    stamp.chmod(0o600)
    return stamp


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can write, in place of one that others can write."""
    try:
        _check_private(folder)
    except FileNotFoundError:
        pass
    except LibraryError:
        _discard(folder)
    folder.mkdir(mode=0o700, exist_ok=True)


def _discard(folder: Path) -> None:
    """Move an entry out of the way, in one step, and delete it."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    else:
        grave = tempfile.mkdtemp(dir=folder.parent, prefix=".damaged-")
        folder.rename(grave)  # within one folder, which works for an entry of another user as well
        shutil.rmtree(grave, ignore_errors=True)


def _check_private(path: Path) -> None:
    """Raise LibraryError unless the file or folder is a real one that nobody but this user and root can write."""
    status = path.lstat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise LibraryError(f"{path} is neither a file nor a folder")
    if status.st_uid not in _trusted_owners():
        raise LibraryError(f"{path} belongs to another user ({status.st_uid})")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise LibraryError(f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):o})")


def _trusted_owners() -> set[int]:
    return {0, os.geteuid()}


def _can_be_made(folder: Path) -> bool:
    existing = next(parent for parent in folder.parents if parent.exists())
    return os.access(existing, os.W_OK | os.X_OK)


def _synchronise(path: Path) -> None:
    """Wait until a file's or folder's contents are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do that with a folder
            raise
    finally:
        os.close(descriptor)
