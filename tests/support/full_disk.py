"""A disk that is full for files of some endings, only once they are written."""

import errno
import os
from contextlib import contextmanager

from kvmix_cli import files


def fill_disk(monkeypatch, *endings):
    """Let no file of these endings be written; looking whether it could be written still works."""
    real = files._temporary

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def temporary(path):
        with real(path) as (file, name):
            yield (Full(file) if path.name.endswith(endings) else file), name

    monkeypatch.setattr(files, "_temporary", temporary)
