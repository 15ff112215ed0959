"""`kill -9` at random moments: what is resumed ends in the same result as what was never interrupted."""

import json
import random
import signal
import time
from pathlib import Path

import forking
import pytest

from kvmix_cli.profile import Profile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL"),
]
KILLS = 1
PATIENCE = 180.0
"""Seconds that a process may take to write its first line."""
EVALUATION = ("--uniform", 2, "--length", 200, "--prefix", 100, "--limit", 6)
BOARD = ("--leaderboard", "--profile", "profile.yaml", "--stored-bits", 3.5, "--random-plans", 1, "--methods", "rank")


def lines(pattern):
    """The whole lines in the files of a pattern, all together."""
    return sum(path.read_bytes().count(b"\n") for path in Path().glob(pattern) if path.is_file())


def killed_and_resumed(chance, journals, *args):
    """Run a command, kill it at random moments after it has kept a sample more, and resume it to its end."""
    kills = 0
    while True:
        before = lines(journals)
        resume = ["--resume"] if kills else []
        with Path("said.txt").open("w") as said:
            process = forking.start(*args, *resume, stdout=said, stderr=said)
        deadline = time.monotonic() + PATIENCE
        while kills < KILLS and process.poll() is None and lines(journals) <= before + 1:
            assert time.monotonic() < deadline, "nothing was kept"
            time.sleep(0.002)
        if kills < KILLS:
            time.sleep(chance.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        process.wait()
        said = Path("said.txt").read_text()
        Path("said.txt").unlink()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, said
            return kills
        kills += 1


@pytest.fixture
def chance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return random.Random(0)


def test_a_profile(chance):
    args = ("profile", "builtin:tiny", "--samples", 10, "--seq-len", 256)
    assert killed_and_resumed(chance, "killed.partial.jsonl", *args, "--out", "killed.yaml") == KILLS
    forking.run(*args, "--out", "whole.yaml", check=True)
    killed, whole = (Profile.load(Path(name)).score("grad-norm") for name in ("killed.yaml", "whole.yaml"))
    assert killed.calibration == whole.calibration
    for index, layer in whole.layers.items():
        for kind in ("k", "v"):
            mean = getattr(layer, kind).mean
            assert getattr(killed.layers[index], kind).mean == pytest.approx(mean, rel=1e-4)  # sums in another order
    assert sorted(path.name for path in Path().iterdir()) == ["killed.yaml", "whole.yaml"]


def test_an_evaluation(chance):
    args = ("eval", "builtin:tiny", *EVALUATION)
    assert killed_and_resumed(chance, "killed/*/samples.jsonl", *args, "--output-dir", "killed") == KILLS
    assert_same_rows(args)


def test_a_leaderboard(chance):
    """On short documents, and a profile with a ranking alone."""
    forking.run("profile", "builtin:tiny", "--samples", 1, "--seq-len", 64, "--out", "profile.yaml", check=True)
    args = ("eval", *BOARD, "--task", "perplexity", *EVALUATION[2:])
    assert killed_and_resumed(chance, "killed/*/samples.jsonl", *args, "--output-dir", "killed") == KILLS
    assert_same_rows(args)
    for kind in ("md", "png"):
        assert len(list(Path("killed").glob(f"leaderboard__*.{kind}"))) == 1


def assert_same_rows(args):
    """All rows are complete and those of an uninterrupted run, apart from when and how fast they were measured."""
    forking.run(*args, "--output-dir", "whole", check=True)
    found = [
        {path.parent.name: read(path) for path in Path(root).glob("*/metrics.json")} for root in ("killed", "whole")
    ]
    assert set(found[0]) == set(found[1])
    for name, row in found[1].items():
        for metric, estimate in row["metrics"].items():
            assert found[0][name]["metrics"][metric] == pytest.approx(estimate, rel=1e-4, abs=1e-6)
        assert found[0][name]["tokens"] == row["tokens"]
        records = [len((Path(root) / name / "samples.jsonl").read_text().splitlines()) for root in ("killed", "whole")]
        assert records[0] == records[1]


def read(path):
    return json.loads(path.read_text())
