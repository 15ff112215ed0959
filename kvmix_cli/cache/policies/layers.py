"""Measures of a prompt's attention in one layer, by which layers share out the tokens that they keep.

Each returns a weight: layers keep tokens in proportion to it. It is the mean over sequences, so that those of a batch
are decided about together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ...plan.tokens import LayerMeasure
from ..observation import AttentionCall, QuerySample, head_weights

WEAK = 0.01
"""Part of a query's largest weight below which VL-Cache takes a weight for nothing."""
MASS = 0.975
"""Part of all attention that the important tokens of ZipVL receive together."""


@dataclass(frozen=True)
class PromptWeights:
    """The weights that some queries of a prompt give to its tokens.

    Attributes:
        weights: `[B, H, R, n]` float32.
        visible: `[B, 1, R, n]`, 1 where a query may see a token, else 0.
        represented: `[R]`, queries of the prompt that each of these stands for.
    """

    weights: Tensor
    visible: Tensor
    represented: Tensor

    @classmethod
    def of(cls, call: AttentionCall, keys: Tensor, sample: QuerySample) -> PromptWeights:
        """Return the weights of a sample of a call's queries over keys `[B, H_kv, n, D]` of all tokens."""
        weights, visible = head_weights(call, keys, sample)
        represented = torch.tensor(sample.of(call.query.shape[2])[1], device=keys.device)
        return cls(weights, visible, represented)

    @property
    def are_tokens(self) -> Tensor:
        """Return the tokens that any query may see, `[B, 1, n]` bool: padding is none."""
        return self.visible.any(2)


def evenness(call: AttentionCall, keys: Tensor) -> float:
    """Return the weight of a layer by how evenly its tokens are attended to (D2O, arXiv 2406.13035, section 3.2).

    `exp(-v)`, where `v` is the variance over tokens of the attention that they have received from all queries, between
    the smallest and the largest of the layer's query heads as 0 and 1, in the mean over heads: as its code has it.
    """
    of = PromptWeights.of(call, keys, QuerySample())
    sums = torch.einsum("bhrn,r->bhn", of.weights, of.represented)
    count = of.are_tokens.sum(-1).clamp(min=1)
    means = (sums * of.are_tokens).sum(-1) / count
    variances = ((sums - means[..., None]).square() * of.are_tokens).sum(-1) / count
    of_heads = variances.mean(0)
    spread = of_heads.max() - of_heads.min()
    scaled = (of_heads - of_heads.min()) / spread if spread > 0 else torch.zeros_like(of_heads)
    return math.exp(-float(scaled.mean()))


def density(call: AttentionCall, keys: Tensor) -> float:
    """Return the part of the last queries' weights that is not weak (VL-Cache, arXiv 2410.23317, section 4.1).

    A weight is weak if it is below a hundredth of the largest of its query. Differs: the last 32 queries are taken for
    those after the image.
    """
    of = PromptWeights.of(call, keys, QuerySample(spread=0))
    strong = of.weights >= WEAK * of.weights.amax(-1, keepdim=True)
    pairs = of.visible.sum() * of.weights.shape[1]
    return float((strong * of.visible).sum() / pairs.clamp(min=1))


def share_of_mass(call: AttentionCall, keys: Tensor) -> float:
    """Return the share of tokens that receive nearly all attention (ZipVL, arXiv 2410.08584, section 3.1).

    Of the fewest tokens whose attention, summed over all queries, adds up to 0.975 of it all in the mean over heads.
    """
    of = PromptWeights.of(call, keys, QuerySample())
    received = torch.einsum("bhrn,r->bn", of.weights, of.represented)
    in_order = received.sort(dim=-1, descending=True).values.cumsum(-1)
    fewest = (in_order < MASS * in_order[:, -1:]).sum(-1) + 1
    return float((fewest / of.are_tokens[:, 0].sum(-1).clamp(min=1)).mean())


LAYER_MEASURES: Mapping[LayerMeasure, Callable[[AttentionCall, Tensor], float]] = MappingProxyType(
    {"variance": evenness, "sparsity": density, "mass": share_of_mass}
)
"""Measures by name: of variance and sparsity, less is more weight."""
