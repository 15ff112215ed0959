"""Set-up of every test: no look-ups on the hub, one compilation, kvmix's attention for models that tests build."""

import gc
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # without a network each look-up takes a minute
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing here is compiled, but importing hqq would load the compiler

APART = ("engine", "matrix", "network")
"""Marks of tests that run only where `-m` names them."""
LONGEST = ("commands", "docs", "project", "studies")
"""Rooms whose single tests take longest. They come first: whoever runs the last tests runs them alone."""

gc.disable()  # until the tests are collected: nothing of what imports and collecting make is garbage
_collections = 0


def pytest_sessionstart(session):
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return  # this process starts those that run the tests
    from filelock import FileLock
    from kvmix_kernels.runtime.native import library_for
    from kvmix_kernels.runtime.native.processor import available, wanted

    from kvmix_cli.cache import register

    user = os.getuid() if hasattr(os, "getuid") else ""
    lock = FileLock(Path(tempfile.gettempdir(), f"kvmix-tests-{user}.lock"))
    with lock, ThreadPoolExecutor() as together:
        list(together.map(library_for, available()[: available().index(wanted()) + 1]))
    register()


def pytest_collection_finish():
    """Leave what lasts as long as the process out of later collections of garbage: a third of the suite's time."""
    gc.freeze()
    gc.enable()


def pytest_runtest_logfinish():
    """Leave out as well what has outlived a whole collection, such as what a test imports and what tests share."""
    global _collections
    if (done := gc.get_stats()[-1]["collections"]) > _collections:
        gc.freeze()
        _collections = done


def pytest_collection_modifyitems(config, items):
    """Leave out what `-m` does not name and has to; start with files of slow tests, those of the longest before."""
    asked = config.getoption("markexpr")
    apart = [name for name in APART if name not in asked]
    left_out = {item for item in items if any(item.get_closest_marker(name) for name in apart)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name not in LONGEST))


@pytest.fixture
def less_text(monkeypatch):
    """Less of what commands read as much of whatever their options are; each has tests of its own that read it all."""
    from kvmix_cli.studies import coded
    from kvmix_cli.studies.recommend import cost

    monkeypatch.setattr(coded, "DOCUMENTS", 1)
    monkeypatch.setattr(coded, "REACH", 1)
    monkeypatch.setattr(cost, "FAR", 512)


@pytest.fixture
def forgetful(monkeypatch):
    """Forget afterwards what a user's files or the examples register."""
    from kvmix_cli import extensions
    from kvmix_cli.cache.merging import MERGES
    from kvmix_cli.cache.policies import TOKEN_SCORES
    from kvmix_cli.cache.transforms import TRANSFORMS
    from kvmix_cli.codecs import CODECS
    from kvmix_cli.plan import merges, token_scores
    from kvmix_cli.profiling import PROBES

    for registry in (TOKEN_SCORES, MERGES, TRANSFORMS, CODECS, PROBES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(token_scores, "_KNOWN", dict(token_scores._KNOWN))
    monkeypatch.setattr(merges, "_OF_HEAD", dict(merges._OF_HEAD))
    monkeypatch.setattr(extensions, "_LOADED", {})
