"""The parts of lm-eval that LongBench uses as they are: the texts of its prompts, its metrics, and its version.

lm-eval's files are read where they are installed, because importing the package would take seconds.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from types import ModuleType

import yaml

from ....errors import EvaluationError, first_sentence
from .datasets import LongBenchDataset

FULL_MARKS = 100.0
_ADVICE = "LongBench's prompts and metrics come from lm-eval: pip install 'kvmix[eval]'"
_RECURSION = 5000
"""Depth of calls; answers have at most 512 tokens, reference sentences some hundred words."""

AnswerMetric = Callable[..., float]
"""A function from an answer, a reference answer and `all_classes` to a score from 0 to 1."""


class _PromptFileLoader(yaml.SafeLoader):
    """A safe YAML loader that reads lm-eval's `!function ...` as nothing."""


_PromptFileLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def version() -> str:
    """Return lm-eval's version. Raises EvaluationError if it is not installed."""
    try:
        return installed_version("lm_eval")
    except PackageNotFoundError as error:
        raise EvaluationError(f"lm-eval is not installed; {_ADVICE}") from error


@functools.cache
def prompt_text(name: str) -> str:
    """Return the prompt of a data set, such as `qasper`, as a Jinja template. Raises EvaluationError."""
    path = _folder() / f"{name}.yaml"
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _PromptFileLoader)["doc_to_text"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise _unexpected(f"no prompt in {path}", error) from error
    if not isinstance(found, str):
        raise _unexpected(f"no prompt in {path}")
    return found


def metric(name: str) -> AnswerMetric:
    """Return one of lm-eval's LongBench metrics. Raises EvaluationError if it, or a package it needs, is missing."""
    found: AnswerMetric | None = getattr(_metrics(), name, None)
    if found is None:
        raise _unexpected(f"no metric {name}")
    return found


def score(dataset: LongBenchDataset, prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Return the best score of a prediction over all reference answers, 0 to 100.

    Args:
        classes: all classes, where the data set is a classification.

    Raises:
        EvaluationError: if lm-eval or a package that its metrics need is missing.
    """
    if dataset.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    compare = metric(dataset.metric)
    with _deep_recursion():
        return FULL_MARKS * max(float(compare(prediction, answer, all_classes=list(classes))) for answer in answers)


@contextmanager
def _deep_recursion() -> Iterator[None]:
    """Allow deeper calls: `rouge` compares two sentences by recursion, and lm-eval scores a RecursionError as 0.

    Without this, the score of two long sentences would depend on how deep in the stack they are compared.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _RECURSION))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


@functools.cache
def _metrics() -> ModuleType:
    path = _folder() / "metrics.py"
    spec = importlib.util.spec_from_file_location("kvmix_longbench_metrics", path)
    if spec is None or spec.loader is None:
        raise _unexpected(f"no metrics in {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fuzzywuzzy on python-Levenshtein, jieba on its escapes
            spec.loader.exec_module(module)
    except ImportError as error:
        missing = first_sentence(error.__cause__ or error.__context__ or error)
        raise EvaluationError(f"lm-eval's metrics cannot be loaded: {missing}; {_ADVICE}") from error
    except OSError as error:
        raise _unexpected(f"no metrics in {path}", error) from error
    logging.getLogger("jieba").setLevel(logging.WARNING)
    return module


def _folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.origin:
        raise EvaluationError(f"lm-eval is not installed; {_ADVICE}")
    return Path(spec.origin).parent / "tasks" / "longbench"


def _unexpected(fault: str, error: Exception | None = None) -> EvaluationError:
    reason = f" ({first_sentence(error)})" if error else ""
    return EvaluationError(f"lm-eval {version()} has {fault}{reason}; use 0.4.13, with which this was checked")
