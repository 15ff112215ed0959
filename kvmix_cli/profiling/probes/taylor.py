"""First-order loss change of each width (|gradient times error|, as in PM-KVQ, arXiv 2505.18610).

    | sum dL/dK * (Q_b(K) - K) |        and the same for V

in nats a token, with the cache's own codec. Every further width is nearly free. It is linear in the error where the
loss is quadratic, so it overrates the cost of wide widths: use it to rank layers, and `fisher` to predict losses.
"""

from __future__ import annotations

from torch import Tensor

from ..change import Change
from ..probe import ChangeProbe


class Taylor(ChangeProbe):
    """First-order change of the loss."""

    name = "taylor"
    unit = "nats"
    labels = "text"

    def cost(self, change: Change) -> Tensor:
        return (change.gradient * change.error).sum().abs() / change.readers
