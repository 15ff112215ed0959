"""What is published: the wheel and the source distribution install and run outside the checkout."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]


def installed(pattern, folder):
    """Install the archive of the folder that has such a name; return where, and the checksums of its files."""
    (archive,) = folder.glob(pattern)
    site = folder / archive.name.replace(".", "-")
    subprocess.run([*PIP, "install", *OFFLINE, "--no-compile", "--target", str(site), str(archive)], check=True)
    files = (path for path in site.rglob("*") if path.is_file() and ".dist-info" not in path.parent.name)
    return site, {path.relative_to(site): sha256(path.read_bytes()).digest() for path in files}


EXTRAS = ("lm_eval", "jieba", "fuzzywuzzy", "rouge", "hqq", "optimum", "accelerate", "gguf", "peft")
"""Packages of the extras of pyproject.toml, which the core installation lacks."""
COMMANDS = [
    "run --model builtin:tiny --preset kivi-2 --prompt def --max-new-tokens 4 --json",
    "profile builtin:tiny --samples 1 --seq-len 64 --json",
    "eval builtin:tiny --uniform 2 --length 320 --prefix 280 --limit 1 --json",
    "report results --json",
]
"""Together they read the packages' own files that are no modules: model, texts, presets, and parts of a page."""
SCRIPT = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None
import kvmix_cli, kvmix_kernels
from kvmix_cli.main import main
print(kvmix_cli.__file__, kvmix_kernels.__file__)
for command in {COMMANDS}:
    sys.argv[1:] = command.split()
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
"""


@pytest.mark.slow
def test_the_installed_archives_are_the_same_and_run_outside_the_checkout(tmp_path):
    """Both are built from the checkout by the build backend itself, and run without the packages of the extras."""
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path), "-t", "sdist", "-t", "wheel"]
    subprocess.run(build, check=True, cwd=ROOT, capture_output=True)
    (site, files), (_, others) = (installed(pattern, tmp_path) for pattern in ("*.whl", "*.tar.gz"))
    assert files == others
    assert (site / "kvmix_cli" / "py.typed").is_file()
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", SCRIPT]
    ran = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    places, answer, profiled, evaluated, reported = ran.stdout.splitlines()
    assert all(place.startswith(str(site)) for place in places.split())
    assert json.loads(answer)["new_tokens"] == 4
    assert Path(work, json.loads(profiled)["profile"]).is_file()
    assert [row["plan"] for row in json.loads(evaluated)["rows"]] == ["unquantized", "uniform-2"]
    assert (work / json.loads(reported)["html"]).read_text().startswith("<!doctype html>")
