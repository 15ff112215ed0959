"""Codebooks of coupled channels, learned from keys and values (CQ, arXiv 2405.03917).

Some tokens of every sample are kept with the squared gradients of their numbers, g^2, by which k-means weighs them
(section 3.3; `profiling/codebooks.py`). Differs: labels of the loss are drawn from the model, and gradients are through
queries that find the token packed, as for `fisher-metric`.

As a score it is one number, 1/2 sum_d E[g_d^2] S_dd with the variances S_dd: the loss if nothing of a layer's keys, or
values, were kept but their mean, by the diagonal of the Fisher metric alone. It says nothing of widths.
"""

from __future__ import annotations

import numpy as np

from ...plan.tensors.moments import TensorMoments
from ..probe import MetricProbe


class CoupledChannels(MetricProbe):
    """Codebooks of the channels of keys and values, and the loss of keeping their mean alone."""

    name = "codebooks"
    unit = "nats at 0 bits"
    keeps_tokens = True

    def score(self, moments: TensorMoments) -> list[float]:
        diagonals = np.einsum("hdd,hdd->h", moments.metric, moments.covariance)
        return [0.5 * float(each) for each in diagonals]
