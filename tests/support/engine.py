"""Start vLLM, let it answer prompts twice, and write what came of it as JSON. Run as a program.

With a folder in `record` it answers once and without a prefix cache, and also writes log-probabilities of its likeliest
tokens and of the prompts' own, and to the folder what its blocks held; see `stored`.
"""

import json
import sys
from pathlib import Path

LIKELIEST = 20


def main():
    from vllm import LLM, SamplingParams

    task = json.load(sys.stdin)
    folder = task["record"]
    settings = {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
        "long_prefill_token_threshold": 256,
        "enable_prefix_caching": folder is None,
        "worker_extension_cls": "stored.RecordingWorker",
        "disable_log_stats": False,
    }
    engine = LLM(model=task["model"], **{**settings, **task["options"]})
    greedy = SamplingParams(temperature=0, max_tokens=task["tokens"], detokenize=False, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    if folder is not None:
        greedy.logprobs, greedy.prompt_logprobs = LIKELIEST, 0
        engine.collective_rpc("begin_recording")
    rounds = []
    for _ in range(2 if folder is None else 1):
        answers = engine.generate(prompts, greedy, use_tqdm=False)
        rounds.append([list(answer.outputs[0].token_ids) for answer in answers])
    if folder is not None:
        engine.collective_rpc("save_recorded", args=(folder,))
    config = engine.llm_engine.vllm_config
    answer = {
        "tokens": rounds,
        "likeliest": [[likely(step) for step in answer.outputs[0].logprobs or []] for answer in answers],
        "scores": [scores(answer) for answer in answers],
        "cached": [answer.num_cached_tokens for answer in answers],
        "preemptions": sum(each.value for each in engine.get_metrics() if each.name == "vllm:num_preemptions"),
        "blocks": config.cache_config.num_gpu_blocks,
        "block": config.cache_config.block_size,
        "bytes": config.cache_config.kv_cache_memory_bytes,
    }
    Path(sys.argv[1]).write_text(json.dumps(answer))


def likely(step):
    """Tokens and their log-probabilities."""
    return list(step), [each.logprob for each in step.values()]


def scores(answer):
    """Log-probabilities of the prompt's tokens, but for the first, which nothing predicts."""
    found = (answer.prompt_logprobs or [])[1:]
    return [step[token].logprob for step, token in zip(found, answer.prompt_token_ids[1:], strict=bool(found))]


if __name__ == "__main__":
    main()
