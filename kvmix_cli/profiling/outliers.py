"""Channels and tokens that stand out among the keys and values of a layer, measured where the cache would hold them.

A group of numbers is quantized in steps of its range. One channel of keys that is `r` times the others has errors `r`
times theirs, and scores sum the errors of all channels; one token that is `r` times the others stretches the range of
every group it is in. Qwen2's key biases are the known case of the first, massive activations of the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache.mixed import unquantized_cache
from ..decoding.feed import prefill
from ..errors import ModelError, is_out_of_memory
from ..models.loading import LoadedModel
from ..models.parts import largest
from ..plan import CacheSettings
from ..profile import LayerOutliers
from .measure import precision_advice

LARGEST = 1e6
"""Most that a ratio is given as: a median channel may be 0."""


@torch.inference_mode()
def measure_outliers(loaded: LoadedModel, tokens: Sequence[int]) -> dict[int, LayerOutliers]:
    """Return how far channels and tokens of each layer that can be quantized stand out, in one sample.

    Tokens of the default sink are left out, as they are not quantized.

    Raises:
        ModelError: if keys or values are not finite, or memory runs out.
    """
    cache = unquantized_cache(loaded.config)
    try:
        prefill(loaded, cache, tokens)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            what = f"read {len(tokens)} tokens through {loaded.info.id}"
            raise ModelError(f"no memory to {what}: use a smaller --seq-len") from error
        raise
    found = {}
    for index in loaded.info.quantizable:
        keys, values = _states(loaded, index, cache.layers[index].keys, "keys"), cache.layers[index].values
        values = _states(loaded, index, values, "values")
        sizes = keys.square().mean(1).sqrt(), keys.norm(dim=-1), values.norm(dim=-1)
        ratios = torch.stack([_ratio(each) for each in sizes])
        key_channel, key_token, value_token = largest(ratios, loaded.ranks).tolist()
        found[index] = LayerOutliers(key_channel=key_channel, key_token=key_token, value_token=value_token)
    return found


def _states(loaded: LoadedModel, index: int, states: Tensor | None, kind: str) -> Tensor:
    """Return one layer's keys or values after the sink, float32 `[H_kv, T, D]`."""
    if states is None:
        raise ModelError(f"layer {index} of {loaded.info.id} keeps no {kind} in the cache, so nothing can be quantized")
    if not torch.isfinite(states).all():
        raise ModelError(
            f"{kind} of layer {index} of {loaded.info.id} are not finite in {loaded.dtype}: {precision_advice(loaded)}"
        )
    sink = min(CacheSettings().sink, states.shape[2] - 1)
    return states[0, :, sink:].float()


def _ratio(sizes: Tensor) -> Tensor:
    """Return the largest of sizes `[H_kv, N]` over the median one, of the head in which that is most."""
    largest, median = sizes.max(1).values, sizes.median(1).values
    ratios = torch.where(largest > 0, largest / median.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return ratios.max().clamp(max=LARGEST)
