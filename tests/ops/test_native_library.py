"""The native library on disk: compiled once, checked before it is loaded, compiled again where it is damaged."""

import ctypes
import logging
import os
import platform
import re
import shlex
import subprocess
import tempfile
import threading
from pathlib import Path

import forking
import pytest
from kvmix_kernels.runtime.native import cache, library, library_for, structs
from kvmix_kernels.runtime.native import processor as processors
from kvmix_kernels.runtime.native.build import BuildError, compiler
from kvmix_kernels.runtime.native.processor import wanted
from warned import fallbacks, falls_back_once

needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
needs_library = pytest.mark.skipif(library() is None, reason="there is no native library")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVMIX_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("KVMIX_NATIVE", raising=False)


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that takes no time; the list of what it has made."""
    contents = {isa: Path(library_for(isa)._name).read_bytes() for isa in ("generic", wanted())}
    made = []

    def compile_library(folder, isa):
        target = folder / "library.so"
        target.write_bytes(contents[isa])
        made.append(target)
        return target

    monkeypatch.setattr(cache, "compile_library", compile_library)
    return made


def load():
    """Load the library as a new process would."""
    return library_for.__wrapped__(wanted())


def mode_of(path):
    return path.stat().st_mode & 0o777


@needs_library
def test_is_compiled_once_and_announced(compiled, caplog):
    for _ in range(2):
        assert load().kvmix_isa().decode() == wanted()
    assert len(compiled) == 1
    assert [(each.name, each.levelno) for each in caplog.records] == [("kvmix", logging.WARNING)]
    assert "compiling its CPU kernels, once" in caplog.text
    assert mode_of(cache.entry(wanted())) == 0o700
    assert sorted(mode_of(path) for path in cache.entry(wanted()).iterdir()) == [0o600, 0o700]
    assert list(cache.cache_dir().iterdir()) == [cache.entry(wanted())], "nothing else is left"


@needs_library
def test_is_on_the_disk_before_it_has_its_name(compiled, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: events.append("fsync") or fsync(file))
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append(Path(to).name) or replace(self, to))
    found = cache.install(wanted())
    assert events == ["fsync", "fsync", found.name, "fsync", cache.STAMP, "fsync", "fsync"]


def cut(library):
    os.truncate(library, library.stat().st_size // 2)


def empty(library):
    os.truncate(library, 0)


def change_a_byte(library):
    with library.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))


def lose_the_stamp(library):
    (library.parent / cache.STAMP).unlink()


def overwrite_the_stamp(library):
    (library.parent / cache.STAMP).write_text("\n")


def let_everybody_write(library):
    library.chmod(0o777)


def let_a_group_write_the_folder(library):
    library.parent.chmod(0o770)


def link_elsewhere(library):
    target = library.rename(library.parent / "elsewhere.so")
    library.symlink_to(target)


def link_the_folder_elsewhere(library):
    elsewhere = library.parent.rename(library.parents[1] / "elsewhere")
    library.parent.symlink_to(elsewhere)


@needs_library
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "bytes instead of"),
        (empty, "has 0 bytes instead of"),
        (change_a_byte, "does not have the checksum"),
        (Path.unlink, "is missing"),
        (lose_the_stamp, "stamp is missing"),
        (overwrite_the_stamp, "is no stamp"),
        (let_everybody_write, "can be written by other users \\(mode 777\\)"),
        (let_a_group_write_the_folder, "can be written by other users \\(mode 770\\)"),
        (link_elsewhere, "is neither a file nor a folder"),
        (link_the_folder_elsewhere, "is neither a file nor a folder"),
    ],
)
def test_a_library_that_must_not_be_loaded_is_compiled_again(compiled, caplog, damage, reason):
    damage(cache.install(wanted()))
    caplog.clear()
    for _ in range(2):
        assert load().kvmix_isa().decode() == wanted()
    assert len(compiled) == 2
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("kvmix: compiling its CPU kernels again")
    assert re.search(reason, message)


@needs_library
def test_a_library_of_another_user_is_not_loaded(compiled, monkeypatch, caplog):
    cache.install(wanted())
    owners = iter([{4242}])
    monkeypatch.setattr(cache, "_trusted_owners", lambda: next(owners, {os.geteuid()}))
    assert load() is not None
    assert len(compiled) == 2
    assert f"belongs to another user ({os.geteuid()})" in caplog.text


@needs_library
def test_what_cannot_be_mended_is_one_named_warning(compiled, monkeypatch):
    cut(cache.install(wanted()))

    def fail(folder, isa):
        raise BuildError("no compiler")

    monkeypatch.setattr(cache, "compile_library", fail)
    with falls_back_once("bytes instead of .*, and it cannot be compiled again: no compiler"):
        assert load() is None


@needs_library
@needs_compiler
def test_a_library_without_a_function_is_compiled_again(compiled, monkeypatch, caplog):
    def compile_nothing(folder, isa):
        target = folder / "library.so"
        subprocess.run([compiler(), "-shared", "-x", "c++", "/dev/null", "-o", str(target)], check=True)
        return target

    with monkeypatch.context() as once:
        once.setattr(cache, "compile_library", compile_nothing)
        cache.install(wanted())
    assert load().kvmix_isa().decode() == wanted()
    assert len(compiled) == 1
    assert "undefined symbol: kvmix_attend" in caplog.text


@needs_library
def test_structs_that_differ_are_named_and_compiled_again_once(compiled, monkeypatch, caplog):
    cache.install(wanted())
    fields = (*structs.CRun._fields_[:-1], ("by_token", ctypes.c_int32))
    other = type("CRun", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(structs, "STRUCTS", (other, *structs.STRUCTS[1:]))
    with falls_back_once("struct Run has by_token:96:8 in C and by_token:96:4 in CRun"):
        assert load() is None
    assert len(compiled) == 2
    assert "struct Run" in caplog.text


@pytest.mark.parametrize("struct", structs.STRUCTS)
def test_every_difference_of_a_struct_is_seen(struct):
    lines = [structs.describe(each) for each in structs.STRUCTS]
    assert structs.mismatch("\n".join(lines)) is None
    name, ours = struct.__name__.removeprefix("C"), structs.describe(struct)
    for line in (f"{name} 4 x:0:4", f"{ours} more:0:0", ours.rpartition(" ")[0]):
        others = [each for each in lines if not each.startswith(f"{name} ")]
        assert structs.mismatch("\n".join([*others, line])).startswith(f"struct {name} has ")
        assert structs.mismatch("\n".join(others)).startswith(f"struct {name} has missing in C")


@needs_library
def test_two_may_compile_at_once(compiled, monkeypatch):
    together, quick = threading.Barrier(2), cache.compile_library

    def slow(folder, isa):
        made = quick(folder, isa)
        together.wait(timeout=60)
        return made

    monkeypatch.setattr(cache, "compile_library", slow)
    found = []
    both = [threading.Thread(target=lambda: found.append(cache.install(wanted()))) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert found == [cache.find(cache.entry(wanted()))] * 2


@needs_library
def test_what_killed_compilers_left_is_removed_and_no_other_folder(compiled):
    home = cache.cache_dir()
    home.mkdir(parents=True, exist_ok=True)
    left, busy, other = (home / name for name in (".building-left", ".building-busy", "notes"))
    for folder in (left, busy, other):
        folder.mkdir()
        (folder / "library.so").touch()
    for folder in (left, other):
        os.utime(folder, (0, 0))
    cache.install(wanted())
    assert [folder.exists() for folder in (left, busy, other)] == [False, True, True]


def test_no_compiler_is_one_named_warning(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with falls_back_once("no C\\+\\+ compiler found \\(install g\\+\\+, or set CXX\\)"):
        assert load() is None


@needs_compiler
def test_a_compiler_that_fails_is_one_named_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("KVMIX_CXXFLAGS", "-no-such-flag")
    with falls_back_once("failed: .*-no-such-flag"):
        assert load() is None
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_one_named_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVMIX_CACHE_DIR", str(tmp_path / "file"))
    with falls_back_once("file cannot be written .*; set KVMIX_CACHE_DIR"):
        assert load() is None


def without_a_home():
    raise RuntimeError("Could not determine home directory.")


@needs_library
@pytest.mark.parametrize("home", [without_a_home, lambda: Path("/proc/no-home"), Path])
def test_a_user_without_a_home_has_a_private_folder(compiled, monkeypatch, tmp_path, home):
    monkeypatch.delenv("KVMIX_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("/proc"))
    assert cache.cache_dir() == tmp_path / f"kvmix-{os.geteuid()}"
    assert load().kvmix_isa().decode() == wanted()
    assert mode_of(cache.cache_dir()) == 0o700


def test_the_environment_says_where(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path
    monkeypatch.delenv("KVMIX_CACHE_DIR")
    assert cache.cache_dir() == tmp_path / "xdg" / "kvmix"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache.cache_dir() == tmp_path / ".cache" / "kvmix"


def test_the_environment_can_do_without(monkeypatch, recwarn):
    monkeypatch.setenv("KVMIX_NATIVE", "0")
    assert load() is None
    assert not fallbacks(recwarn)


@needs_library
def test_the_environment_can_ask_for_less(compiled, monkeypatch):
    monkeypatch.setenv("KVMIX_ISA", "generic")
    loaded = load()
    assert loaded.kvmix_isa() == b"generic"
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("sse2", ("generic",)),
        ("avx2", ("generic",)),
        ("avx2 fma", ("generic", "avx2")),
        ("avx2 fma avx512f avx512bw avx512vl", ("generic", "avx2")),
        ("avx2 fma avx512f avx512bw avx512vl avx512dq", ("generic", "avx2", "avx512")),
        ("fma avx2 avx512_vnni avx512f avx512bw avx512vl avx512dq", ("generic", "avx2", "avx512", "vnni")),
    ],
)
def test_a_processor_has_what_it_has_all_features_of(monkeypatch, tmp_path, flags, expected):
    """The library is compiled for the last of them, and for nothing else."""
    (tmp_path / "cpuinfo").write_text(
        f"processor\t: 0\nflags\t\t: fpu {flags} sse\nbugs\t\t: avx512_vnni\n\nflags\t: x\n"
    )
    monkeypatch.setattr(processors, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(processors, "available", processors.available.__wrapped__)
    monkeypatch.delenv("KVMIX_ISA", raising=False)
    assert processors.available() == expected
    assert processors.wanted() == expected[-1]
    for asked in ("vnni", "avx2", "no such"):
        monkeypatch.setenv("KVMIX_ISA", asked)
        assert processors.wanted() == (asked if asked in expected else expected[-1])


@pytest.mark.parametrize(("machine", "file"), [("aarch64", "/proc/cpuinfo"), ("x86_64", "gone")])
def test_a_processor_of_which_nothing_is_known_has_generic_code(monkeypatch, machine, file):
    monkeypatch.setattr(processors, "_CPUINFO", Path(file))
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert processors.available.__wrapped__() == ("generic",)


@needs_library
def test_a_library_for_another_instruction_set_is_compiled_again(compiled, monkeypatch, caplog):
    """As where a folder was copied from another machine under the name of this one's."""
    if wanted() == "generic":
        pytest.skip("this processor has no other instruction set")
    compile_library = cache.compile_library
    with monkeypatch.context() as once:
        once.setattr(cache, "compile_library", lambda folder, isa: compile_library(folder, "generic"))
        cache.install(wanted())
    assert load().kvmix_isa().decode() == wanted()
    assert len(compiled) == 2
    assert f"is for generic, not for {wanted()}" in caplog.text


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(os.name != "posix", reason="the compiler is a shell script")
def test_a_cut_library_ends_no_process(tmp_path, tmp_path_factory):
    """In real processes, because a mistake here is a signal; their compiler copies the library that is there."""
    script = tmp_path_factory.mktemp("compiler") / "g++"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\ncp {shlex.quote(library()._name)} "$last"\n')
    script.chmod(0o755)

    def run():
        code = "from kvmix_kernels.runtime.native import instruction_set; print(instruction_set())"
        return forking.run(code=code, env={**os.environ, "CXX": str(script)}, check=True)

    first = run()
    assert first.stdout.strip() == wanted()
    assert first.stderr == "kvmix: compiling its CPU kernels, once (some seconds)\n"
    (entry,) = tmp_path.iterdir()
    cut(next(entry.glob("*.so")))
    second = run()
    assert second.stdout == first.stdout
    assert "compiling its CPU kernels again" in second.stderr
