"""Second-order loss change of each width, by the Fisher information of the attention output.

    1/2 sum_t (dL/dO_t . (O'_t - O_t))^2        t: queries that read something packed

in nats a token. `O'` is what attention really gives with the keys, or values, quantized, so the softmax is exact, and
only what comes after the layer is taken for quadratic. The labels of L are drawn from the model (the true Fisher;
those of the text give the empirical one), for which the gradients of different tokens are independent and the sum
is, in expectation, the divergence KL(unquantized || quantized) to second order.

Against measured divergences of builtin:tiny (2 to 8 bits, 30 samples) the rank correlation is 0.998 and the scale 0.99.
A diagonal in K itself, `sum (dL/dK)^2 (Q(K) - K)^2`, is as good there, but at 1 bit its rank correlation is 0.72, and
that of this one 0.99; labels of the text change the scale only, to 1.6.
"""

from __future__ import annotations

from torch import Tensor

from ..change import Change
from ..probe import ChangeProbe


class Fisher(ChangeProbe):
    """Second-order change of the loss."""

    name = "fisher"
    unit = "nats"
    labels = "model"

    def cost(self, change: Change) -> Tensor:
        by_token = (change.output_gradient * change.output_change).sum(dim=(0, 1, 3))
        return by_token.square().sum() / (2 * change.readers)
