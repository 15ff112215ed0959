"""Libraries are quiet, unless `kvmix -v`."""

import ctypes
import logging

import pytest

from kvmix_cli.quiet import hushed, mute_stdout


def test_libraries_are_hushed_and_come_back():
    library = logging.getLogger("transformers")
    level = library.level
    with hushed():
        assert not library.isEnabledFor(logging.WARNING)
        assert library.isEnabledFor(logging.ERROR)
    assert library.level == level


def test_verbose_hushes_nothing(monkeypatch):
    monkeypatch.setattr(logging.getLogger("kvmix"), "level", logging.INFO)
    logging.getLogger("kvmix").manager._clear_cache()
    level = logging.getLogger("transformers").level
    with hushed():
        assert logging.getLogger("transformers").level == level


def test_what_compiled_code_prints_is_dropped_and_only_that(capfd):
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    with pytest.raises(KeyError), mute_stdout():
        libc.puts(b"noise")
        raise KeyError
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"
