"""The quantized KV cache for transformers. Importing this registers the attention implementation `kvmix`."""

from .attention import register
from .mixed import Attended, MixedCache, stock_layers, unquantized_cache
from .sizes import cache_nbytes

__all__ = ["Attended", "MixedCache", "cache_nbytes", "stock_layers", "unquantized_cache"]

register()
