"""Decoding in vLLM's CPU engine, with and without a plan: its own processor time a step, of one thread.

    KVMIX_PLAN=plan.yaml .venv-vllm/bin/python kernels/bench/bench_engine_cpu.py MODEL --context 4096 --batch 4

Prompts are random tokens, read once; then they are found in the prefix cache, so that the second call decodes only.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, whose time is measured

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    from vllm import LLM, SamplingParams

    longest = options.context + options.steps + 1
    engine = LLM(options.model, dtype=options.dtype, enforce_eager=True, max_model_len=longest, max_num_seqs=64)
    draw = torch.Generator().manual_seed(0)
    shape = (options.batch, options.context)
    prompts = [{"prompt_token_ids": ids} for ids in torch.randint(5, 1000, shape, generator=draw).tolist()]

    def took(tokens: int) -> float:
        start = time.process_time()
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine.generate(prompts, sampling, use_tqdm=False)
        return time.process_time() - start

    first = took(1)
    times = []
    for _ in range(options.repeats):
        before = took(1)
        times.append((took(options.steps + 1) - before) / options.steps)
    blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
    each = ", ".join(f"{1000 * seconds:.1f}" for seconds in times)
    median = 1000 * statistics.median(times)
    print(f"prompts {first:.1f} s; {blocks} blocks; milliseconds a step: {each}, median {median:.1f}")


if __name__ == "__main__":
    main()
