"""What is published: the wheel and the source distribution install and run outside the checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Both archives, built from the checkout by the build backend itself."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder), "-t", "sdist", "-t", "wheel"]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True)
    return {"sdist": next(folder.glob("*.tar.gz")), "wheel": next(folder.glob("*.whl"))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installed_archive_runs_outside_the_checkout(kind, archives, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    subprocess.run([*PIP, "install", *OFFLINE, "--target", str(site), str(archives[kind])], check=True)

    def python(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        result = subprocess.run(
            [sys.executable, *arguments], cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    places = python("-c", "import kvmix_cli, kvmix_kernels; print(kvmix_cli.__file__, kvmix_kernels.__file__)")
    assert all(place.startswith(str(site)) for place in places.split())
    model = ["--model", "builtin:tiny", "--preset", "kivi-2"]
    answer = json.loads(
        python("-m", "kvmix_cli", "run", *model, "--prompt", "def f():", "--max-new-tokens", "4", "--json")
    )
    assert answer["new_tokens"] == 4
    less = [] if kind == "wheel" else ["--samples", "1", "--limit", "1"]
    shown = json.loads(python("-m", "kvmix_cli", "demo", "--quick", *less, "--json"))
    assert {row["plan"] for row in shown["rows"]} >= {"unquantized", "kvmix", "uniform-2"}
    assert (work / shown["plot"]).read_bytes().startswith(b"\x89PNG")
    assert (site / "kvmix_cli" / "py.typed").is_file()
