"""lm-eval's tasks with their data, and the requests that they make of their documents."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from lm_eval.tasks import TaskManager

from ....errors import first_sentence
from .boundary import named, quiet, task_errors
from .names import TaskSelection, refuse_unsafe
from .requests import KINDS

if TYPE_CHECKING:
    from lm_eval.api.group import Group as LMEvalGroup
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task as LMEvalTask

    from ....models.loading import LoadedModel
    from .model import KvmixLM

SEED = 1234
"""lm-eval's own, so that `--seed 0` draws the examples that it draws."""
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


class LoadedTasks(TypedDict):
    """Tasks and groups by name, as lm-eval's `TaskManager.load` returns and its `evaluate` takes them."""

    tasks: dict[str, LMEvalTask]
    groups: dict[str, LMEvalGroup]
    group_map: dict[str, list[str]]


@dataclass(frozen=True)
class TaskSetup:
    """Settings of lm-eval's tasks.

    Attributes:
        limit: documents of each task; None for all.
        shots: examples in a prompt; None for what the task says. A task that forbids them has none.
        chat: put prompts into the tokenizer's chat template.
        length: tokens of contexts that a task makes itself; None for what the task says.
    """

    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    length: int | None = None
    seed: int = 0


def load_tasks(selection: TaskSelection, setup: TaskSetup, loaded: LoadedModel | None = None) -> LoadedTasks:
    """Load tasks with their data.

    Args:
        loaded: the model whose tokenizer measures the contexts that a task makes itself.

    Raises:
        EvaluationError: if a task cannot be set up, or its data cannot be loaded.
    """
    result = LoadedTasks(tasks={}, groups={}, group_map={})
    with ExitStack() as stack:
        metadata = stack.enter_context(_metadata(loaded, setup)) if selection.makes_data and loaded else None
        with quiet():
            folders = [str(folder) for folder in selection.folders]
            manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
        for name in selection.names:
            with task_errors(partial(_set_up_fault, name, selection)), quiet(bars=True):
                _seed_all(setup.seed)
                found = manager.load([name])
            result["tasks"] |= found["tasks"]
            result["groups"] |= found["groups"]
            result["group_map"] |= found["group_map"]
    for name, task in result["tasks"].items():
        refuse_unsafe(name, getattr(task, "UNSAFE_CODE", False), getattr(task, "MULTIMODAL", False))
        _set_examples(task, setup)
    return result


def build_requests(tasks: Mapping[str, LMEvalTask], setup: TaskSetup, lm: KvmixLM) -> dict[str, list[Instance]]:
    """Return all requests by kind, in the order in which lm-eval sends them to a model.

    Raises:
        KvmixError: if prompts cannot be made of a task's documents, or the chat template cannot be used.
    """
    found: dict[str, list[Instance]] = {kind: [] for kind in KINDS}
    for name, task in tasks.items():
        with task_errors(partial(_prompt_fault, name)), quiet():
            _seed_all(setup.seed)
            task.build_all_requests(
                limit=setup.limit,
                apply_chat_template=setup.chat,
                fewshot_as_multiturn=setup.chat,
                chat_template=lm.apply_chat_template if setup.chat else None,
                tokenizer_name=lm.tokenizer_name if setup.chat else "",
            )
        for instance in task.instances:
            found[instance.request_type] += [instance] * (instance.repeats or 1)
    return found


def _seed_all(seed: int) -> None:
    """Seed all generators of random numbers as lm-eval does before it loads anything: tasks may shuffle."""
    random.seed(seed)
    np.random.seed(SEED + seed)
    torch.manual_seed(SEED + seed)


@contextmanager
def _metadata(loaded: LoadedModel, setup: TaskSetup) -> Iterator[dict[str, Any]]:
    """Yield what RULER and similar tasks read: a tokenizer by its name, here a copy of the model's, and the length."""
    with tempfile.TemporaryDirectory() as folder:
        loaded.tokenizer.save_pretrained(folder)
        lengths = {"max_seq_lengths": [setup.length]} if setup.length else {}
        yield {"tokenizer": folder, "pretrained": folder, **lengths}


def _set_examples(task: LMEvalTask, setup: TaskSetup) -> None:
    fixed = task.get_config("num_fewshot")
    if setup.shots is not None and fixed != 0:
        task.set_config("num_fewshot", setup.shots)
    elif fixed is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(SEED + setup.seed)


def _prompt_fault(name: str, error: Exception) -> str:
    return f"{name}: no prompts can be made of its documents: {named(error)}"


def _set_up_fault(name: str, selection: TaskSelection, error: Exception) -> str:
    return f"{name}: {_reason(error, selection)}"


def _reason(error: Exception, selection: TaskSelection) -> str:
    splits = {config[key] for config in selection.tasks.values() for key in _SPLITS if config.get(key)}
    if isinstance(error, KeyError) and error.args and error.args[0] in splits:
        return f"its data has no split '{error.args[0]}', which the task needs"
    if "must have valid or test docs" in str(error):
        return "it names no split to measure on: give it a test_split or a validation_split"
    if isinstance(error, ImportError):
        return f"a package that it needs is not installed: {first_sentence(error)}"
    if isinstance(error, OSError):
        return (
            f"its data cannot be loaded: {first_sentence(error)}; check the network, HF_HOME or the task's dataset_path"
        )
    return f"lm-eval cannot set it up: {named(error)}"
