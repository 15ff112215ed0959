"""What a quantized cache must amount to, written as simply as possible.

Every token is kept, nothing is packed: when the window's rule asks for a token, its keys and values are replaced by
what the naive codec makes of them. No pages ahead of time, no tiles, no handles.
"""

from itertools import count

import torch
from kvmix_kernels.quantize import dequantize, quantize
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvmix_cli.plan import Plan
from kvmix_cli.plan.forms import page_layout


class ReferenceLayer(DynamicLayer):
    """A stock layer whose old tokens have been through the codec."""

    def __init__(self, layer, settings):
        super().__init__()
        self.plans = {"key": layer.k, "value": layer.v}
        self.settings = settings
        self.done = {"key": 0, "value": 0}

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized:
            self.keys = self._age("key", self.keys)
            self.values = self._age("value", self.values)
        return super().update(key_states, value_states, *args, **kwargs)

    def _age(self, kind, states):
        tensor = self.plans[kind]
        if tensor.bits == 16:
            return states
        sink, page = self.settings.sink, self.settings.page
        tail = states.shape[2] - sink - self.done[kind]
        pages = max(0, tail - keep(self.settings.window, tail, tensor.bits)) // page
        layout = page_layout(tensor, kind, self.settings, states.shape[3])
        states = states.clone()
        for start in [sink + self.done[kind] + page * i for i in range(pages)]:
            old = states[:, :, start : start + page]
            states[:, :, start : start + page] = dequantize(*quantize(old, layout), layout).to(states.dtype)
        self.done[kind] += pages * page
        return states


def keep(window, tail: int, bits: int) -> int:
    """Tokens of a tail that stay, from the definitions and not from `kvmix_cli.windows`."""
    if window.kind == "recent":
        return window.tokens
    if window.kind == "rpc":
        return next(n for n in count() if n + 1 > {1: 0.1, 2: 0.1, 3: 0.2, 4: 0.2, 8: 0.2}[bits] * tail)
    return 0


def reference_cache(plan: Plan, config) -> DynamicCache:
    """The stock cache with a reference layer for each planned one."""
    cache = DynamicCache(config=config)
    for index, layer in plan.layers.items():
        cache.layers[index] = ReferenceLayer(layer, plan.cache)
    return cache


def dense_attention(query, key, value, scaling, mask=None, softcap=None, sinks=None) -> torch.Tensor:
    """Attention in one piece, in float64; `mask` is boolean, additive or None for causal."""
    return dense_attention_lse(query, key, value, scaling, mask, softcap, sinks)[0]


def dense_attention_lse(query, key, value, scaling, mask=None, softcap=None, sinks=None):
    """The same, and the logarithms of the sums of weights."""
    repeats = query.shape[1] // key.shape[1]
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        extra = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return weights[..., : key.shape[2]] @ value, scores.logsumexp(dim=-1)
