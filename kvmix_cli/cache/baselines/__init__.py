"""Baselines: caches of other projects, measured beside ours. See docs/baselines.md.

bf16            16 bits, whatever the model's dtype
fp8             8-bit floats without a scale, as serving engines store them by default
hf-fp8          transformers' QuantizedCache: 8-bit floats with one scale a tensor
hf-quanto-N     transformers' QuantizedCache on optimum-quanto
hf-hqq-N        transformers' QuantizedCache on HQQ
"""
