"""Number formats in Triton kernels, the same on a GPU and in Triton's interpreter.

The interpreter truncates to bfloat16, loses its subnormals and multiplies matrices of it as if the bits were integers
(`tests/ops/interpreted/canary.py`). There these functions do it properly; on a GPU they are single instructions.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether this process has Triton's interpreter for a GPU (`TRITON_INTERPRET=1`)."""


@triton.jit
def to_float32(x):
    """Return exactly the value of `x`."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round a float32 to `dtype`, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, sum):
    """Return `sum + a @ b` in float32, of matrices of one dtype; float32 ones are rounded to TF32 on a GPU."""
    if INTERPRETED:
        return tl.dot(to_float32(a), to_float32(b), sum, input_precision="ieee")
    return tl.dot(a, b, sum)
