"""Correction of the loss that moments promise of transform codes, by what a profile has measured.

Moments say what errors cost that have nothing to do with each other, and that are of one size on all tokens. Neither is
so: errors of a document add up, and a few tokens bear most of them. How much more is lost depends on the number of
exact tokens and on the length of the context, in which ever fewer tokens are not packed yet, and hardly on bits: so a
profile measures a plan for each of some numbers, in contexts of two lengths (`studies.coded`).
"""

from __future__ import annotations

import math

import numpy as np

from ..profile import CodedLoss, Score


def loss_ratio(score: Score, exact: int, context: int) -> float:
    """Return measured over promised loss of transform codes; 1 where nothing was measured.

    Its logarithm is linear in the number of exact tokens, and in the logarithm of the context, between those that were
    measured; beyond them it is that of the nearest.

    Args:
        score: the score that the codes are made from.
        exact: exact tokens of a page.
        context: tokens of the documents that the loss is a mean over.
    """
    measured = score.coded_contexts
    if not measured:
        return 1.0
    logarithms = [_log_ratio(losses, exact) for losses in measured.values()]
    return math.exp(float(np.interp(math.log(context), [math.log(each) for each in measured], logarithms)))


def predicted_context(score: Score, context: int) -> int | None:
    """Return the context that a predicted loss is of if `context` is asked for; None where nothing was measured."""
    measured = score.coded_contexts
    return min(max(context, min(measured)), max(measured)) if measured else None


def _log_ratio(losses: list[CodedLoss], exact: int) -> float:
    counts = [each.exact for each in losses]
    return float(np.interp(exact, counts, [math.log(each.measured / each.predicted) for each in losses]))
