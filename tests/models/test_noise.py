"""Libraries are quiet, unless `kvmix -v`."""

import logging

from kvmix_cli.noise import hushed


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
