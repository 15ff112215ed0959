"""What LongBench takes from lm-eval as it is: the texts of its prompts, its metrics, and its version.

lm-eval's files are read where they are, because importing the package would take seconds.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from types import ModuleType

import yaml

from ....errors import EvaluationError, first_sentence

Metric = Callable[..., float]

_ADVICE = "LongBench's prompts and metrics come from lm-eval: pip install 'kvmix[eval]'"


class _Loader(yaml.SafeLoader):
    """Reads `!function ...` as nothing."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def version() -> str:
    """Of lm-eval. Raises EvaluationError if it is not installed."""
    try:
        return installed_version("lm_eval")
    except PackageNotFoundError as error:
        raise EvaluationError(f"lm-eval is not installed; {_ADVICE}") from error


@functools.cache
def prompt_text(name: str) -> str:
    """The prompt of a data set, such as `qasper`, as a Jinja template. Raises EvaluationError."""
    path = _folder() / f"{name}.yaml"
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)["doc_to_text"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise _unexpected(f"no prompt in {path}", error) from error
    if not isinstance(found, str):
        raise _unexpected(f"no prompt in {path}")
    return found


def metric(name: str) -> Metric:
    """A function of lm-eval's LongBench metrics: an answer, a reference and `all_classes` to 0 to 1.

    Raises:
        EvaluationError: if it, or a package it needs, is missing.
    """
    found: Metric | None = getattr(_metrics(), name, None)
    if found is None:
        raise _unexpected(f"no metric {name}")
    return found


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


def _unexpected(what: str, error: Exception | None = None) -> EvaluationError:
    reason = f" ({first_sentence(error)})" if error else ""
    return EvaluationError(f"lm-eval {version()} has {what}{reason}; use 0.4.13, with which this was checked")
