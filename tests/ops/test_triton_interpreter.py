"""The Triton kernels on a CPU, in Triton's interpreter: the files of `interpreted/`, each in another process.

Triton decides when it is imported that it interprets, and the other tests of this process compile.
"""

from pathlib import Path

import forking
import pytest

pytest.importorskip("triton")
FILES = sorted((Path(__file__).parent / "interpreted").glob("*.py"))
PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
OPTIONS = ("-p", "interpreting", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    ran = forking.run(*OPTIONS, file, code=PYTEST, imports=forking.INTERPRETER)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout
