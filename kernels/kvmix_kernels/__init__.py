"""Operations on packed keys and values; one subpackage an operation, each with a `naive.py` that is its definition.

from kvmix_kernels import PageLayout                        # no torch
from kvmix_kernels.segments import Segments
from kvmix_kernels.quantize import quantize, dequantize
from kvmix_kernels.attend import AttentionProblem, attend
"""

from .layout import BITS, FULL_PRECISION_BITS, PageLayout

__all__ = ["BITS", "FULL_PRECISION_BITS", "PageLayout"]
