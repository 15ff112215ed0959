"""lm-eval's tasks with their data, and the prompts that they make of it."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.tasks import TaskManager

from ....errors import EvaluationError, KvmixError, first_sentence
from .names import Found, refuse
from .quiet import quiet
from .requests import KINDS

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task as HarnessedTask

    from ....models.loading import LoadedModel
    from .model import KvmixLM

SEED = 1234
"""lm-eval's own, so that `--seed 0` draws the examples that it draws."""
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Asked:
    """How tasks are to be set up.

    Attributes:
        limit: documents of each task; None for all.
        shots: examples in a prompt; None for what the task says. A task that forbids them has none.
        length: of contexts that a task makes itself.
    """

    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    length: int | None = None
    seed: int = 0


def load_tasks(found: Found, asked: Asked, loaded: LoadedModel | None = None) -> dict[str, Any]:
    """Tasks with their data, as lm-eval's `TaskManager.load` gives them.

    Args:
        loaded: the model whose tokenizer measures the contexts that a task makes itself.

    Raises:
        EvaluationError: if a task cannot be set up, or its data cannot be had.
    """
    result: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with ExitStack() as stack:
        metadata = stack.enter_context(_metadata(loaded, asked)) if found.makes_data and loaded else None
        with quiet():
            folders = [str(folder) for folder in found.folders]
            manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
        for name in found.names:
            with _blamed_on(name, found), quiet(bars=True):
                _sow(asked.seed)
                for key, part in manager.load([name]).items():
                    result[key] |= part
    for name, task in result["tasks"].items():
        refuse(name, getattr(task, "UNSAFE_CODE", False), getattr(task, "MULTIMODAL", False))
        _set_up(task, asked)
    return result


def build_requests(tasks: Mapping[str, HarnessedTask], asked: Asked, lm: KvmixLM) -> dict[str, list[Instance]]:
    """All requests by kind, in the order in which lm-eval asks for them.

    Raises:
        EvaluationError: if prompts cannot be made of a task's documents.
    """
    found: dict[str, list[Instance]] = {kind: [] for kind in KINDS}
    for name, task in tasks.items():
        try:
            with quiet():
                _sow(asked.seed)
                task.build_all_requests(
                    limit=asked.limit,
                    apply_chat_template=asked.chat,
                    fewshot_as_multiturn=asked.chat,
                    chat_template=lm.apply_chat_template if asked.chat else None,
                    tokenizer_name=lm.tokenizer_name if asked.chat else "",
                )
        except Exception as error:
            raise EvaluationError(f"{name}: no prompts can be made of its documents: {_said(error)}") from error
        for instance in task.instances:
            found[instance.request_type] += [instance] * (instance.repeats or 1)
    return found


def _sow(seed: int) -> None:
    """As lm-eval does before it loads anything: tasks may shuffle."""
    random.seed(seed)
    np.random.seed(SEED + seed)
    torch.manual_seed(SEED + seed)


@contextmanager
def _metadata(loaded: LoadedModel, asked: Asked) -> Iterator[dict[str, Any]]:
    """What RULER and its like want to know: a tokenizer by name, which here is a copy of ours, and the length."""
    with tempfile.TemporaryDirectory() as folder:
        loaded.tokenizer.save_pretrained(folder)
        lengths = {"max_seq_lengths": [asked.length]} if asked.length else {}
        yield {"tokenizer": folder, "pretrained": folder, **lengths}


def _set_up(task: HarnessedTask, asked: Asked) -> None:
    fixed = task.get_config("num_fewshot")
    if asked.shots is not None and fixed != 0:
        task.set_config("num_fewshot", asked.shots)
    elif fixed is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(SEED + asked.seed)


@contextmanager
def _blamed_on(name: str, found: Found) -> Iterator[None]:
    """Whatever a task's own code raises becomes one line. Raises EvaluationError."""
    try:
        yield
    except KvmixError:
        raise
    except Exception as error:
        raise EvaluationError(f"{name}: {_reason(error, found)}") from error


def _reason(error: Exception, found: Found) -> str:
    splits = {config[key] for config in found.tasks.values() for key in _SPLITS if config.get(key)}
    if isinstance(error, KeyError) and error.args and error.args[0] in splits:
        return f"its data has no split '{error.args[0]}', which the task needs"
    if "must have valid or test docs" in str(error):
        return "it names no split to measure on: give it a test_split or a validation_split"
    if isinstance(error, ImportError):
        return f"a package that it needs is not installed: {first_sentence(error)}"
    if isinstance(error, OSError):
        return f"its data cannot be had: {first_sentence(error)}; check the network, HF_HOME or the task's dataset_path"
    return f"lm-eval cannot set it up: {_said(error)}"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_sentence(error)}"
