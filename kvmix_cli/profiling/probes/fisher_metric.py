"""The loss's own metric of keys and values, for every direction of a head (Fisher information).

    M = E[sum_j g_j g_j^T]        g_j = dL/dk_j, and dL/dv_j, of a packed token j, through queries that find it packed

in nats a predicted token, over the tokens that the cache would not keep exact (`profiling/moments.py`). Labels of L are
drawn from the model, so that 1/2 E[e^T M e] is, to second order, the divergence that errors e of all packed keys cost
if they have nothing to do with each other. M goes to the profile's tensors with the covariance S and the mean of keys
and values: see `plan/tensors/moments.py`, and `plan/tensors/metric.py` for what they become.

As a score it is one number, 1/2 tr(M S), summed over heads: the loss if nothing of a layer's keys, or values, were
kept but their mean. It says which layers matter, and nothing of widths.
"""

from __future__ import annotations

from ...plan.tensors.moments import TensorMoments
from ..probe import MetricProbe


class FisherMetric(MetricProbe):
    """Loss metric of keys and values, and the loss of keeping their mean alone."""

    name = "fisher-metric"
    unit = "nats at 0 bits"

    def score(self, moments: TensorMoments) -> list[float]:
        return [0.5 * float((m * s.T).sum()) for m, s in zip(moments.metric, moments.covariance, strict=True)]
