"""vLLM's CPU engine as a peer of bench_peers_cpu.py: its own cache types, in a process of its own environment.

vLLM wants an older transformers than kvmix is measured with, so it cannot be imported beside it. The process
(vllm_worker.py) takes its turns like the other peers, and times its engine itself.
"""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import IDS
from torch import Tensor

WORKER = Path(__file__).with_name("vllm_worker.py")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",
    "TORCHDYNAMO_DISABLE": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
}
"""One process for all of the engine, with as many threads as it is told, compiled as vLLM does by itself, and without
our plugin."""


class VllmPeer:
    """A vLLM engine whose keys and values have one type.

    Args:
        python: of the environment that has vLLM.
        folder: of weights and configuration.
        kind: "bfloat16" or "fp8".
        room: tokens that its cache will hold at most.
        threads: for prompts and for decoding.
    """

    def __init__(self, python: Path, folder: Path, kind: str, room: int, threads: int) -> None:
        command = [str(python), str(WORKER), str(folder.resolve()), kind, str(room)]
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
        self._name = f"vLLM {kind}"
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._state: dict[str, Any] = {"wall": 0.0, "cpu": 0.0}

    def read(self, ids: Sequence[int]) -> None:
        self._ask({"read": list(ids)})

    def fill(self, tokens: int) -> None:
        """Read a prompt of random tokens: vLLM takes no keys and values from elsewhere."""
        self.read(random.Random(0).choices(range(IDS), k=tokens))

    def step(self, token: int) -> Tensor:
        self._ask({"step": token})
        return torch.from_numpy(np.frombuffer(base64.b64decode(self._state["logits"]), np.float32).copy())

    @property
    def nbytes(self) -> int:
        """Return the bytes of the blocks in use."""
        return int(self._state["nbytes"])

    @property
    def peak(self) -> int:
        return int(self._state["peak"])

    def seconds(self, *, cpu_time: bool) -> float:
        return float(self._state["cpu" if cpu_time else "wall"])

    def _ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._name} ended with code {self._process.wait()}; what it said is above")
        self._state = json.loads(answer)
