"""The process of vLLM that bench_peers_cpu.py compares with: it decodes the tokens that it is given."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm-env`")

PROMPT, LATER = list(range(5, 205)), [11, 7, 19, 3]


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_decoding_known_tokens_predicts_what_reading_them_does(model, kind, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "kernels" / "bench")
    from peers_vllm import VllmPeer

    peer = VllmPeer(Path(sys.executable), model, kind, len(PROMPT) + len(LATER) + 2, 1)
    peer.read(PROMPT + LATER)
    read = peer.step(LATER[-1])
    peer.read(PROMPT)
    for token in [*LATER, LATER[-1]]:
        decoded = peer.step(token)
    assert peer.seconds(cpu_time=True) > 0
    assert peer.nbytes == 2 * 128 * 8 * 2 * 2 * 64 * (2 if kind == "bfloat16" else 1)  # blocks, layers, K and V, heads
    # In bfloat16, whose sums depend on how many tokens are read at once
    assert (read - decoded).abs().max() < 0.5
    assert read.argmax() == decoded.argmax()
    assert (read - peer.step(LATER[0])).abs().max() > 1
    with pytest.raises(SystemExit):
        peer.step(LATER[0])  # there is room for no more
