"""How good an answer is: lm-eval's metrics under LongBench's rules."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from . import borrowed
from .datasets import Dataset

FULL_MARKS = 100.0
_RECURSION = 5000
"""Calls deep; answers have at most 512 tokens, reference sentences some hundred words."""


def score(dataset: Dataset, prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The best score over all reference answers, 0 to 100.

    Args:
        classes: of a classification, all there are.

    Raises:
        EvaluationError: if lm-eval or a package its metrics need is missing.
    """
    if dataset.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    metric = borrowed.metric(dataset.metric)
    with _room_to_recurse():
        return FULL_MARKS * max(float(metric(prediction, answer, all_classes=list(classes))) for answer in answers)


@contextmanager
def _room_to_recurse() -> Iterator[None]:
    """`rouge` walks back through two sentences by recursion, and lm-eval takes a RecursionError for a score of 0.

    Without this, what two long sentences score would depend on how deep in the stack they are compared.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, _RECURSION))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
