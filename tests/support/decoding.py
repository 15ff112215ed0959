"""Attention as decoding token by token through a quantized cache would have it, in one dense piece and in float64.

Nothing is packed and nothing is tiled: every query has a mask of the tokens that the cache has packed by then, and
reads those from other keys or values than the rest.
"""

import torch
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "decoding"


def packed_mask(tokens, cache):
    """`[T, T]`: whether the query at a row finds the token of a column packed, from the definition of a window."""
    query, token = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    page = (token - cache.sink).div(cache.page, rounding_mode="floor")
    return (page >= 0) & (query - cache.sink - cache.window.tokens >= (page + 1) * cache.page)


def leaves_of(model, ids, labels, cache, layer):
    """Return keys and values of one layer as packed tokens are read from them, with their gradients, by kind."""
    leaves = {}

    def apart(kind, states):
        return leaves.setdefault(kind, states.detach().clone().requires_grad_())

    with Decoding(model, cache, layer, apart):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    cross_entropy(logits.double(), labels, reduction="sum").backward()
    return leaves


class Decoding:
    """While it is used as `with Decoding(...) as outputs`, one layer reads packed tokens as `change` makes them.

    Args:
        change: from kind and states `[1, H_kv, T, D]` to what the packed ones become; of latent attention from the
            latent and its rotary part.
    """

    def __init__(self, model, cache, layer, change):
        self.model, self.cache, self.layer, self.change = model, cache, layer, change
        self.outputs = {}
        self.states = {}
        self.far = None
        indexed = (module for module in model.modules() if getattr(module, "layer_idx", None) == layer)
        self.latent = next((module for module in indexed if hasattr(module, "expand_kv")), None)

    def __enter__(self):
        if self.latent is not None:
            vars(self.latent)["expand_kv"] = self._expand
        self.before = self.model.config._attn_implementation
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        self.model.set_attn_implementation(NAME)
        return self

    def __exit__(self, *_):
        if self.latent is not None:
            del vars(self.latent)["expand_kv"]
        self.model.set_attn_implementation(self.before)

    def _expand(self, latent, rotary):
        expand = type(self.latent).expand_kv
        self.far = expand(self.latent, self.change("key", latent), self.change("value", rotary))
        return expand(self.latent, latent, rotary)

    def _attend(self, module, query, key, value, mask, scaling=None, softcap=None, s_aux=None, **_):
        index, tokens = module.layer_idx, key.shape[2]
        far_key, far_value = key, value
        if index == self.layer:
            far_key, far_value = self.far or (self.change("key", key), self.change("value", value))
        heads = query.shape[1] // key.shape[1]
        key, value, far_key, far_value = (x.repeat_interleave(heads, 1) for x in (key, value, far_key, far_value))
        far = packed_mask(tokens, self.cache)
        scores = torch.where(far, query @ far_key.mT, query @ key.mT) * (scaling or query.shape[-1] ** -0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril() if mask is None else mask
        scores = scores.masked_fill(~causal, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
        weights = scores.softmax(-1)[..., :tokens]
        output = torch.where(far, weights, 0.0) @ far_value + torch.where(far, 0.0, weights) @ value
        if output.requires_grad:
            output.retain_grad()
        self.outputs[index] = output
        return output.transpose(1, 2).contiguous(), None
