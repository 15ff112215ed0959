"""The script that compares us with what a user would pick: its cells run on the built-in model, once each."""

import importlib
import json
import re
import resource
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
OURS = ["DynamicCache bfloat16", "kvmix 16", "kvmix 2", "kvmix transform 2"]
SMALL = ("--contexts", "288", "--prompts", "1", "--rounds", "1", "--steps", "2", "--threads", "1")


Done = namedtuple("Done", "stdout")
PEAK = 7 * 2**20


@pytest.fixture
def whole(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("bench_peers_cpu")


@pytest.fixture
def script(whole, monkeypatch):
    """The script without processes of their own, which import torch anew for each peer."""
    monkeypatch.setattr(whole, "peak", lambda *_: PEAK)
    return whole


def cells(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_cell_has_times_bytes_and_kl_and_is_measured_once(script, tmp_path, capsys):
    out = tmp_path / "peers.jsonl"
    arguments = (*SMALL, "--out", str(out), "--peers", ",".join(OURS))
    script.main(arguments)
    (cell,) = cells(out)
    assert (cell["model"], cell["context"], cell["fill"], [*cell["peers"]]) == ("builtin:tiny", 288, "text", OURS)
    timed = cell["peers"]
    assert {(len(each["prompt_s"]), len(each["step_ms"])) for each in timed.values()} == {(1, 2)}
    assert timed["kvmix 2"]["nbytes"] < timed["kvmix 16"]["nbytes"] == timed[OURS[0]]["nbytes"]
    assert all(each["peak"] == PEAK for each in timed.values())
    # 16 bits differ from the unquantized cache only in the order of sums, in bfloat16
    assert timed[OURS[0]]["kl"] is None
    assert timed["kvmix 16"]["kl"] < 0.01 < timed["kvmix 2"]["kl"]
    script.main(arguments)
    assert cells(out) == [cell]
    row = r"^\| (.+?) \| \d+ \| [\d.]+ \| [\d.]+ \| [\d.]+x \| ([\d.]+x) \| [\d.]+ \| 7 \| "
    rows = re.findall(row, capsys.readouterr().out, re.MULTILINE)
    assert [name for name, _ in rows] == OURS * 2
    assert [over for name, over in rows if name in OURS[:2]] == ["1.00x"] * 4


@pytest.mark.slow
def test_random_caches_hold_the_context_and_have_no_kl(script, tmp_path):
    out = tmp_path / "peers.jsonl"
    script.main((*SMALL, "--fill", "random", "--out", str(out), "--peers", ",".join(OURS)))
    timed = cells(out)[0]["peers"]
    assert all(each["kl"] is None and not each["prompt_s"] and each["step_ms"] for each in timed.values())
    tokens, per_token = 288 + 3, 8 * 2 * 2 * 64 * 2  # layers, keys and values, heads, channels, bytes
    assert timed["kvmix 16"]["nbytes"] == tokens * per_token


def test_a_peer_alone_says_how_much_memory_its_process_has(whole, capsys):
    whole.main(("--contexts", "288", "--threads", "1", "--alone", "kvmix 2"))
    peak = int(capsys.readouterr().out)
    assert peak == 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_process_of_its_own_gets_the_options_that_matter(whole, monkeypatch, tmp_path):
    profile = tmp_path / "profile.yaml"
    options = SimpleNamespace(model="random-1b", weights=tmp_path, profile=profile)
    found = []
    monkeypatch.setattr(whole.subprocess, "run", lambda command, **_: found.append(command) or Done("notice\n9\n"))
    assert whole.peak("kvmix 2", 99, options) == 9
    given = " ".join(found[0][2:])
    assert f"--model random-1b --weights {tmp_path} --contexts 99" in given
    assert given.endswith(f"--alone kvmix 2 --profile {profile}")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("llama.cpp f16", "needs llama-cpp-python"),
        ("QuantizedCache hqq 4", "needs hqq"),
        ("ollama", "no peer 'ollama'"),
    ],
)
def test_a_peer_that_cannot_be_had_is_refused_by_name(script, tmp_path, monkeypatch, named, said):
    for module in ("llama_cpp", "hqq"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=said):
        script.main(("--out", str(tmp_path / "peers.jsonl"), "--peers", named))
