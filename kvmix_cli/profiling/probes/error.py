"""Relative error of the attention output at each width (KVTuner, arXiv 2502.04420):

    ||O' - O|| / ||O||

where queries attend to keys, or values, as the cache holds them. Knows nothing of the loss, and needs no backward
pass: a small error may hurt and a large one may not.
"""

from __future__ import annotations

from torch import Tensor

from ..base import ChangeProbe
from ..change import Change


class Error(ChangeProbe):
    """Relative error of the attention output."""

    name = "error"
    unit = "relative error"
    labels = None

    def cost(self, change: Change) -> Tensor:
        return change.output_change.norm() / change.output.norm()
