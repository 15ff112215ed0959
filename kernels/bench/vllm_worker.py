"""vLLM's engine for one sequence, driven line by line: peers_vllm.py starts it, in the environment that has vLLM.

    .venv-vllm/bin/python kernels/bench/vllm_worker.py FOLDER KIND ROOM

A line of JSON on stdin is a request: `{"read": [ids]}` reads a prompt into an empty cache, `{"step": id}` decodes one
known token. The answer is a line on stdout: `wall` and `cpu`, seconds of the engine since its beginning; `nbytes`, of
the cache's blocks that are in use; `peak`, resident bytes of this process; and `logits`, float32 in base64.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from resident import peak_nbytes
from torch import Tensor
from vllm import EngineArgs, LLMEngine, SamplingParams

BLOCK = 128
"""Tokens of a block of vLLM's cache on a CPU."""
SPARE_BLOCKS = 2
"""Blocks beyond those of the sequence: vLLM keeps one that nothing is written to, and looks a token ahead."""
KINDS = {"bfloat16": ("auto", 2), "fp8": ("fp8", 1)}
"""By kind of cache vLLM's `kv_cache_dtype`, and the bytes of a number."""


class Engine:
    """An engine whose tokens are given instead of sampled.

    Args:
        folder: of weights and configuration.
        kind: a name of `KINDS`.
        room: tokens that its cache will hold at most.
    """

    def __init__(self, folder: Path, kind: str, room: int) -> None:
        dtype, self._number_nbytes = KINDS[kind]
        self._config = json.loads((folder / "config.json").read_text())
        self._room = room
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder),
                dtype="bfloat16",
                kv_cache_dtype=dtype,
                kv_cache_memory_bytes=self._blocks_nbytes(-(-room // BLOCK) + SPARE_BLOCKS),
                max_model_len=room + 1,
                max_num_seqs=1,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
            )
        )
        self._runner = self._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self._logits = torch.empty(0)
        self._held = 0
        self._requests = 0
        self.wall = self.cpu = 0.0
        compute = self._runner.model.compute_logits

        def kept(*args: Any, **kwargs: Any) -> Tensor:
            self._logits = compute(*args, **kwargs)
            return self._logits

        self._runner.model.compute_logits = kept

    def read(self, ids: list[int]) -> None:
        """Read a prompt into an empty cache, as vLLM schedules it, up to the first new token."""
        if self._requests:
            self._engine.abort_request([str(self._requests)])
        self._requests += 1
        tokens = self._room - len(ids) + 1  # what is sampled last of all is never decoded
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._requests), {"prompt_token_ids": ids}, sampling)
        self._held = len(ids)
        while not self._timed_step():
            pass

    def step(self, token: int) -> None:
        """Decode a known token, which takes the place of what was sampled last."""
        self._runner.input_batch.token_ids_cpu[0, self._held] = token
        self._held += 1
        if not self._timed_step():
            raise SystemExit(f"vLLM has ended its request at token {self._held} of {self._room}")

    def state(self) -> dict[str, Any]:
        """Return what an answer says."""
        logits = self._logits[-1].float().numpy()
        return {
            "wall": self.wall,
            "cpu": self.cpu,
            "nbytes": self._blocks_nbytes(-(-self._held // BLOCK)),
            "peak": peak_nbytes(),
            "logits": base64.b64encode(logits.tobytes()).decode(),
        }

    def _timed_step(self) -> bool:
        """Run the engine once; return True if a token has come."""
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = self._engine.step()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return any(output.outputs[0].token_ids for output in outputs)

    def _blocks_nbytes(self, blocks: int) -> int:
        config = self._config
        dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * dim
        return int(blocks * BLOCK * token * self._number_nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("room", type=int)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # what else writes to stdout would be no answer
    os.dup2(2, 1)
    engine = Engine(options.folder, options.kind, options.room)
    for line in sys.stdin:
        request = json.loads(line)
        if "read" in request:
            engine.read(request["read"])
        else:
            engine.step(request["step"])
        print(json.dumps(engine.state()), file=answers, flush=True)


if __name__ == "__main__":
    main()
