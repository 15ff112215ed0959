"""Correction of the loss that moments promise of transform codes, by what a profile has measured.

Moments say what errors cost that have nothing to do with each other, and that are of one size on all tokens. Neither is
so: errors of a document add up, and a few tokens bear most of them. How much more is lost depends on the number of
exact tokens, and hardly on bits, so a profile measures a plan for each of some numbers (`studies.coded`).
"""

from __future__ import annotations

import math

import numpy as np

from ..profile import Score


def loss_ratio(score: Score, exact: int) -> float:
    """Return measured over promised loss of transform codes with so many exact tokens; 1 where nothing was measured.

    Its logarithm is linear between the numbers that were measured; beyond them it is that of the nearest.
    """
    if not score.coded:
        return 1.0
    counts = [each.exact for each in score.coded]
    ratios = [math.log(each.measured / each.predicted) for each in score.coded]
    return math.exp(float(np.interp(exact, counts, ratios)))
