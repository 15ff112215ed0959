"""Silence for lm-eval, which prints, logs and draws bars: kvmix writes its own lines and one JSON object to stdout."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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
