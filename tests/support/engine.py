"""Start vLLM, let it answer prompts twice, and write what came of it as one line of JSON. Run as a program."""

import json
import sys


def main():
    from vllm import LLM, SamplingParams

    task = json.load(sys.stdin)
    settings = {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
        "long_prefill_token_threshold": 256,
        "enable_prefix_caching": True,
    }
    engine = LLM(model=task["model"], **{**settings, **task["options"]})
    greedy = SamplingParams(temperature=0, max_tokens=task["tokens"], detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    rounds = []
    for _ in range(2):
        answers = engine.generate(prompts, greedy, use_tqdm=False)
        rounds.append([list(answer.outputs[0].token_ids) for answer in answers])
    config = engine.llm_engine.vllm_config
    answer = {
        "tokens": rounds,
        "cached": [answer.num_cached_tokens for answer in answers],
        "blocks": config.cache_config.num_gpu_blocks,
        "block": config.cache_config.block_size,
        "bytes": config.cache_config.kv_cache_memory_bytes,
    }
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    main()
