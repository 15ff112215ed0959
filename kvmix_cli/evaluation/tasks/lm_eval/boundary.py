"""The boundary to lm-eval's code and its tasks': their output is silenced, and their errors become kvmix's.

lm-eval prints, logs and draws bars, while kvmix writes its own lines and one JSON object to stdout. A task is code of
its author's and may raise anything.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ....errors import EvaluationError, KvmixError, class_and_sentence
from ....quiet import hushed, verbose

_LOGGERS = ("lm_eval", "nltk", "evaluate")


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Keep this block from writing to stdout, and to stderr unless under `kvmix -v`.

    Args:
        bars: leave stderr alone if it is a terminal, for the bars of a download.
    """
    if verbose():
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    nowhere = io.StringIO()
    with hushed(), warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if not (bars and sys.stderr.isatty()):
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def task_errors(explain: Callable[[Exception], str]) -> Iterator[None]:
    """Raise EvaluationError, with the explanation of the error, for whatever a task's own code raises in this block."""
    try:
        yield
    except KvmixError:
        raise
    except Exception as error:  # the one place: code of a task may raise any class
        raise EvaluationError(explain(error)) from error


def named(error: Exception) -> str:
    """Return an error's class and its first sentence."""
    return class_and_sentence(error)
