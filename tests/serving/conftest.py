"""Engines that tests of serving start: each in a process of its own, once for all tests that ask for the same."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engines import PATIENCE, environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The built-in model as a folder."""
    folder = tmp_path_factory.mktemp("engine") / "tiny"
    shutil.copytree(ROOT / "kvmix_cli" / "assets" / "tiny", folder)
    return folder


@pytest.fixture(scope="session")
def ask(model):
    """A function that starts an engine and returns what tests/support/engine.py wrote about its answers."""
    answers = {}

    def asked(plan, prompts, tokens=16, **options):
        key = str(plan), json.dumps(options, sort_keys=True)
        if key not in answers:
            task = {"model": str(model), "prompts": prompts, "tokens": tokens, "options": options}
            command = [sys.executable, str(ROOT / "tests" / "support" / "engine.py")]
            # One process where one rank is enough: a start imports vLLM once instead of three times.
            alone = {} if options.get("tensor_parallel_size", 1) > 1 else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            ran = subprocess.run(
                command,
                input=json.dumps(task),
                env=environment(plan, **alone),
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            assert ran.returncode == 0, ran.stderr[-4000:]
            answers[key] = {**json.loads(ran.stdout.splitlines()[-1]), "said": ran.stderr}
        return answers[key]

    return asked
