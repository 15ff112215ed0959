"""The Triton kernels on a CPU, in Triton's interpreter: the files of `interpreted/`, all in one other process.

Triton decides when it is imported that it interprets, and the other tests of this process compile.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted(map(str, (Path(__file__).parent / "interpreted").glob("*.py")))


@pytest.mark.slow
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *FILES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
