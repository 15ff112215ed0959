"""An estimate of what a forward takes beside weights and cache, from a configuration alone. No torch.

Of the tensors that are alive at the same time, the estimate counts those of the larger of attention and feed-forward in
one layer: the attention is fused, so its scores are in no tensor, and a prompt's logits are those of the last token.
The factors are those of transformers' own code, of whose operations docs/fit.md compares the sizes with the estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .stock import FLOAT32_BYTES, StockLayer

RESIDUALS = 4
"""Hidden states alive within a layer: the embeddings, the layer's input, its residual, and the same normalized."""
PROJECTED = 4
"""Tensors as large as the queries while positions are applied: the queries, their halves swapped, and two products."""
GATED = 3
"""Tensors as wide as the feed-forward at its end: gate, up, and their product."""
GATED_EXPERTS, CLAMPED_EXPERTS = 4, 9
"""The same of experts, whose gate and up are one tensor; with biases and clamped, as in GPT-OSS."""
ROUTED, ROUTED_FLOAT32 = 4, 6
"""Hidden states for each expert of a token while outputs are put back in order; with weights in float32 (DeepSeek)."""


@dataclass(frozen=True)
class ActivationSizes:
    """Sizes of a model that its activations depend on, in elements of a token.

    Attributes:
        hidden: width of the residual stream.
        queries: a token's queries, in the layer that has most.
        keys: a token's keys and values, in the layer that has most.
        feed_forward: what is alive at the peak of a feed-forward, of a mixture for all experts of a token together.
        vocabulary: entries of the output.
        sliding: keys and values of a token in all layers with a window, which are whole until the next forward.
        window: tokens of the smallest window, whose mask is a tensor; None if no layer has one.
    """

    hidden: int
    queries: int
    keys: int
    feed_forward: int
    vocabulary: int
    sliding: int
    window: int | None

    def peak(self, tokens: int, batch: int, element_bytes: int, context: int | None = None) -> int:
        """Return the bytes alive at the peak of a forward, roughly.

        Args:
            tokens: fed at once, in each of `batch` sequences.
            context: tokens that they attend to, themselves included; by default themselves.
        """
        residuals = RESIDUALS * self.hidden * element_bytes
        norm = 2 * self.hidden * FLOAT32_BYTES
        attention = (PROJECTED * self.queries + 2 * self.keys) * element_bytes
        feed_forward = self.feed_forward * element_bytes
        logits = batch * self.vocabulary * (element_bytes + FLOAT32_BYTES)
        context = tokens if context is None else context
        has_mask = self.window is not None and context > self.window
        kept = tokens * self.sliding * element_bytes + (tokens * context if has_mask else 0)
        return batch * (tokens * (residuals + max(norm, attention, feed_forward)) + kept) + logits


def activation_sizes(config: PreTrainedConfig, cache: Sequence[StockLayer]) -> ActivationSizes:
    """Return the sizes of a model that its activations depend on.

    Args:
        cache: layers of its stock cache.
    """
    text = config.get_text_config(decoder=True)
    layers = list(text.per_layer_config)
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    return ActivationSizes(
        hidden=hidden,
        queries=max(_number(layer, "num_attention_heads") * _head_dim(layer, hidden) for layer in layers),
        keys=max((layer.heads.token_elements for layer in cache if layer.heads is not None), default=0),
        feed_forward=max(_feed_forward(layer, hidden) for layer in layers),
        vocabulary=_number(text, "vocab_size"),
        sliding=sum(layer.heads.token_elements for layer in cache if layer.window is not None and layer.heads),
        window=min((layer.window for layer in cache if layer.window is not None), default=None),
    )


def _head_dim(layer: Any, hidden: int) -> int:
    """Return the channels of a query; of latent attention with the part that has positions."""
    latent = _number(layer, "qk_nope_head_dim") + _number(layer, "qk_rope_head_dim")
    return latent or _number(layer, "head_dim") or hidden // max(1, _number(layer, "num_attention_heads"))


def _feed_forward(layer: Any, hidden: int) -> int:
    """Return the elements alive at the peak of a layer's feed-forward, of the experts of one token all together."""
    dense = _number(layer, "intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner") or 4 * hidden
    experts = _number(layer, "num_experts_per_tok", "num_experts_per_token", "moe_k")
    expert = _number(layer, "moe_intermediate_size", "expert_ffn_hidden_size") or dense
    gated = CLAMPED_EXPERTS if getattr(layer, "swiglu_limit", None) is not None else GATED_EXPERTS
    routed = ROUTED_FLOAT32 if hasattr(layer, "n_routed_experts") else ROUTED
    return max(GATED * dense, experts * max(hidden + gated * expert, routed * hidden))


def _number(of: Any, *names: str) -> int:
    """Return the first of these settings that is a number, 0 if there is none; of a list, its largest."""
    for name in names:
        value = getattr(of, name, None)
        if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0
