"""Files are written whole or not at all, and trouble is found before any work."""

import errno
import os
import stat
from pathlib import Path

import pytest

from kvmix_cli.errors import OutputError
from kvmix_cli.files import behind_links, check_writable, write_bytes, write_text


@pytest.fixture
def full_disk(monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def read_only(monkeypatch):
    def mkstemp(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkstemp", mkstemp)


def test_folders_are_made(tmp_path):
    path = write_text(tmp_path / "a" / "b" / "file.yaml", "été\n")
    assert path.read_text(encoding="utf-8") == "été\n"


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127])
def test_a_name_may_be_as_long_as_the_system_takes(tmp_path, name):
    check_writable(tmp_path / name)
    assert write_bytes(tmp_path / name, b"x").read_bytes() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = write_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"cannot write .*file.yaml: No space left on device; no file was changed"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.yaml"]


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.yaml"
    path.write_text("old")

    def replace(self, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError, match="Input/output error"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.yaml"]


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def fsync(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "file.yaml", "new")
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder(tmp_path, monkeypatch):
    read_only(monkeypatch)
    for attempt in (lambda path: write_text(path, "x"), check_writable):
        with pytest.raises(OutputError, match="Read-only file system; no file was changed"):
            attempt(tmp_path / "file.yaml")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        check_writable(tmp_path / "sub" / "file.yaml")


def test_checking_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "a" / "b" / "file.yaml")
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for attempt in (lambda path: write_text(path, "x"), check_writable):
        with pytest.raises(OutputError, match=r"Not a directory|File exists"):
            attempt(tmp_path / "file" / "sub.yaml")


def test_a_folder_in_place_of_the_file(tmp_path):
    for attempt in (lambda path: write_text(path, "x"), check_writable):
        with pytest.raises(OutputError, match="Is a directory"):
            attempt(tmp_path)


def test_a_device_or_a_pipe_is_never_replaced(tmp_path):
    """A rename would do so for everybody, where the user may write to its folder."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/full")
    for path in (pipe, link, Path("/dev/null"), Path("/dev/stdout"), Path("/dev/fd/1"), Path("/proc/self/fd/2")):
        for write in (check_writable, lambda path: write_text(path, "x")):
            with pytest.raises(
                OutputError, match=f"cannot write {path}: it is a device or a pipe; name a file; no file"
            ):
                write(path)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert link.is_symlink()


def test_a_dash_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(OutputError, match="cannot write to standard output here: name a file"):
            write(Path("-"))
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_file_is_replaced_and_the_file_is_kept(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("kept")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "file").read_text() == "kept"
    assert (tmp_path / "link").read_text() == "new"


def test_a_link_that_a_user_names_stands_for_its_file(tmp_path):
    file, link, loop, stream = (tmp_path / name for name in ("file", "link", "loop", "stream"))
    link.symlink_to("file")
    loop.symlink_to("loop")
    stream.symlink_to("/dev/full")
    for _ in range(2):  # first it leads nowhere yet
        assert write_text(behind_links(link), "new") == file.resolve()
    assert link.is_symlink()
    for path in (file, loop, stream, tmp_path, Path("/dev/stdout"), Path("-")):
        assert behind_links(path) == path


def test_what_killed_processes_left_is_removed_and_nothing_of_others(tmp_path):
    left, fresh = tmp_path / ".plan.yaml.abc123.unfinished", tmp_path / ".plan.yaml.def456.unfinished"
    others = [
        tmp_path / ".plan.yaml.swp",
        tmp_path / ".other.yaml.abc123.unfinished",
        tmp_path / "plan.yaml.unfinished",
    ]
    for path in (left, fresh, *others):
        path.touch()
    for path in (left, *others):
        os.utime(path, (0, 0))
    write_text(tmp_path / "plan.yaml", "a")
    assert sorted(tmp_path.iterdir()) == sorted([fresh, *others, tmp_path / "plan.yaml"])
