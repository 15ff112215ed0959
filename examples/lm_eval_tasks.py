"""Tasks of lm-eval through caches of several widths, side by side.

    python examples/lm_eval_tasks.py                                        # a small task that is made here, offline
    python examples/lm_eval_tasks.py --model meta-llama/Llama-2-7b --tasks gsm8k,piqa --limit 100 --bits 16,4,3,2

lm-eval asks and judges; what the model reads has gone through the cache of a plan. `kvmix eval --task` does the same
from the command line, and keeps every answer: docs/lm-eval.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from kvmix_cli import Plan, load_model
from kvmix_cli.evaluation.tasks.lm_eval.model import KvmixLM
from kvmix_cli.texts import load_texts

OWN = "which_text_follows"
CONTEXT, CONTINUATION, CHOICES = 2000, 120, 3
"""Characters of a context and of a continuation, and how many continuations there are to choose from."""


def write_task(folder: Path, documents: int) -> None:
    """Write a task file and its data: which of several continuations is the one that a text goes on with."""
    end = CONTEXT + CONTINUATION
    long = [text for text in load_texts("builtin", held_out=True) if len(text) >= end]
    rows = []
    for number, text in enumerate(long[:documents]):
        gold = number % CHOICES
        others = (long[(number + other) % len(long)] for other in range(1, CHOICES))
        choices = [other[CONTEXT:end] for other in others]
        choices.insert(gold, text[CONTEXT:end])
        rows.append({"context": text[:CONTEXT], "choices": choices, "gold": gold})
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {
        "task": OWN,
        "output_type": "multiple_choice",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
    }
    (folder / f"{OWN}.yaml").write_text(json.dumps(task))  # JSON is YAML


def evaluate(model: KvmixLM, tasks: Sequence[str], folder: Path, limit: int) -> dict[str, Any]:
    """Return lm-eval's results for a model: the metrics of each task, and what it says of the model."""
    manager = TaskManager(include_path=str(folder), include_defaults=list(tasks) != [OWN])
    found = lm_eval.simple_evaluate(model, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0)
    return {"results": found["results"], "quantized": found["config"]["quantized_share"]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every metric of every task at each width, and how much of what was read was quantized."""
    parser = argparse.ArgumentParser(description="Tasks of lm-eval through caches of several widths.")
    parser.add_argument("--model", default="builtin:tiny", help="a hub id, a local folder or builtin:tiny")
    parser.add_argument("--tasks", default=OWN, help="tasks of lm-eval, with commas")
    parser.add_argument("--bits", default="16,4,2", help="widths of keys and values; 16 is not quantized")
    parser.add_argument("--limit", type=int, default=6, help="documents of each task")
    options = parser.parse_args(arguments)
    loaded, tasks = load_model(options.model), options.tasks.split(",")
    with tempfile.TemporaryDirectory() as name:
        if OWN in tasks:
            write_task(Path(name), options.limit)
        for bits in map(int, options.bits.split(",")):
            plan = Plan.uniform(loaded.info, bits, bits)
            found = evaluate(KvmixLM(loaded, plan=plan.short), tasks, Path(name), options.limit)
            print(f"{bits} bits, {plan.bits.stored:g} stored, {found['quantized']:.0%} read quantized")
            for task, metrics in found["results"].items():
                numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
                print("   ", task, *(f"{key.removesuffix(',none')} {value:.3f}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()
