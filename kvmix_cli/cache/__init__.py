"""The quantized KV cache for transformers: sink | packed pages | tail, and the baselines measured beside it.

Importing this package imports neither torch nor transformers.
"""


def register() -> None:
    """Make `attn_implementation="kvmix"` known to transformers; `load_model` does so by itself."""
    from .attention import register_attention

    register_attention()
