"""Relative error of the attention output at each width (KVTuner, arXiv 2502.04420).

    ||O' - O|| / ||O||

where queries attend to keys, or values, as the cache holds them. It does not look at the loss and needs no backward
pass: a small error may cost much and a large one nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..change import Change
from ..probe import ChangeProbe


class Error(ChangeProbe):
    """Relative error of the attention output."""

    name = "error"
    unit = "relative error"
    labels = None

    def cost(self, change: Change) -> Tensor:
        error: Tensor = torch.linalg.vector_norm(change.output_change) / torch.linalg.vector_norm(change.output)
        return error
