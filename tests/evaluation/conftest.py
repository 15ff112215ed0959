"""Task files for lm-eval, and what lm-eval's own model makes of them."""

import pytest
from harness_tasks import asked, plain, write_tasks


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with one task file of each kind, a group and a tag; tests must not write to it."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def expected(folder):
    """Results and replies of lm-eval's own model on the tasks of the folder."""
    return asked(folder, plain(batch_size=4))
