"""Quantize pages of keys or values into packed words and scales, and back."""

from .naive import decode, dequantize, encode, pack, quantize, unpack

__all__ = ["decode", "dequantize", "encode", "pack", "quantize", "unpack"]
