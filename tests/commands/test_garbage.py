"""Garbage is looked for once there are tensors, and never among what was imported."""

import gc
import weakref

import forking
import pytest

from kvmix_cli.garbage import look_again, put_off

AFTERWARDS = """
import gc
from kvmix_cli.main import main
from kvmix_cli.models import loading
load = loading.load_model
def watched(*args, **options):
    loaded = load(*args, **options)
    print("loaded:", gc.isenabled(), flush=True)
    return loaded
loading.load_model = watched
try:
    main()
finally:
    print("ended:", gc.isenabled(), gc.get_freeze_count() > 10 * len(gc.get_objects()), flush=True)
"""


class Cycle:
    def __init__(self):
        self.itself = self


def dropped():
    """A weak reference to an object that only the search for garbage can find."""
    return weakref.ref(Cycle())


@pytest.fixture
def put_back():
    """Turn the search on again. What was passed over stays so: all that pytest has collected is, to save time."""
    yield
    gc.enable()


@pytest.mark.usefixtures("put_back")
def test_what_is_made_before_tensors_stays_and_what_comes_after_is_found():
    with put_off():
        assert not gc.isenabled()
        before = dropped()
        look_again()
        assert gc.isenabled()
        after = dropped()
        gc.collect()
        assert (before() is None, after() is None) == (False, True)
        kept = dropped()
    assert gc.isenabled()
    gc.collect()
    assert kept() is not None


def test_a_program_that_has_turned_the_search_off_keeps_it_so():
    gc.disable()
    try:
        look_again()
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_command_looks_for_garbage_from_its_model_on(tmp_path):
    ran = forking.run("profile", "builtin:tiny", "--samples", 1, "--seq-len", 32, code=AFTERWARDS, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [line for line in ran.stdout.splitlines() if line.startswith(("loaded", "ended"))] == [
        "loaded: True",
        "ended: True True",
    ]
