"""Task files for lm-eval, one of each kind, with data that is written beside them: nothing is fetched."""

import copy
import functools
import json

import yaml
from evaluating import shallow

from kvmix_cli.texts import load_texts

DOCUMENTS = 3
"""Of each task, of different lengths."""

GENERATE = {
    "task": "local_generate",
    "output_type": "generate_until",
    "doc_to_text": "{{context}}",
    "doc_to_target": "e",
    "generation_kwargs": {"until": [" the", "\n\n"], "max_gen_toks": 10, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {
            "name": "with-an-e",
            "filter": [{"function": "regex", "regex_pattern": "(e)"}, {"function": "take_first"}],
        },
        {"name": "none", "filter": [{"function": "take_first"}]},
    ],
}
CHOOSE = {
    "task": "local_choose",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
}
SCORE = {
    "task": "local_score",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{next}}",
    "target_delimiter": "",
}
ROLL = {
    "task": "local_roll",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
}
ALL = (GENERATE, CHOOSE, SCORE, ROLL)
NAMES = tuple(str(task["task"]) for task in ALL)
GROUP = {
    "group": "local_group",
    "task": ["local_choose", "local_score"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}


@functools.cache
def documents():
    """What all tasks are about: pieces of held-out text, each with what follows it."""
    words = " ".join(load_texts("builtin", held_out=True, seed=0)).split()
    found = []
    for number in range(DOCUMENTS):
        piece = words[400 * number : 400 * number + 46 + 9 * number]
        context, rest = piece[:-12], piece[-12:]
        found.append(
            {
                "context": " ".join(context),
                "next": " " + " ".join(rest[:3]),
                "choices": [" ".join(rest[: k + 2]) for k in range(3)],
                "gold": number % 3,
                "text": " ".join(piece),
            }
        )
    return found


def write_tasks(folder, *tasks, **changes):
    """Write task files, all of the above by default, each with the changes; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents()))
    files = {"data_files": {"test": str(data), "train": str(data)}, "cache_dir": str(folder / "cache")}
    common = {"tag": "local_tag", "dataset_path": "json", "test_split": "test", "dataset_kwargs": files}
    for task in tasks or (*ALL, GROUP):
        config = task if "group" in task else {**common, **task, **changes}
        path = folder / f"{config.get('group') or config['task']}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return folder


def plain(loaded=None, **options):
    """lm-eval's own Hugging Face model, on the weights of `shallow()` or others."""
    from lm_eval.models.huggingface import HFLM

    loaded = loaded or shallow()
    options.setdefault("max_length", loaded.max_length)
    return HFLM(pretrained=loaded.model, tokenizer=copy.deepcopy(loaded.tokenizer), **options)


def asked(folder, model, names=NAMES, **options):
    """What lm-eval itself gets: its results, and every reply."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model=model, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options)


def replies(results, names=NAMES):
    """Every reply in lm-eval's results, by task and document."""
    return {name: {each["doc_id"]: each["resps"] for each in results["samples"][name]} for name in names}
