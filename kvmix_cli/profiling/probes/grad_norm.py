"""The paper's score: the loss gradient of each layer's K and V projection (arXiv 2506.08018, section 3.2).

    s_K = ||dL/dW_k||_2        s_V = ||dL/dW_v||_2

L is the mean next-token loss of one sample. One forward and one backward give every layer's norms. A gradient is
freed as soon as its norm is taken, so that the memory over the bare model is the activations and one gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..probe import WeightProbe


class GradNorm(WeightProbe):
    """L2 norm of the loss gradient with respect to W_k and W_v."""

    name = "grad-norm"
    unit = "gradient norm"

    def score(self, gradient: Tensor) -> Tensor:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(gradient, dtype=dtype)
        return norm
