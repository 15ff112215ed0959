"""What Triton's interpreter gets wrong, and `kvmix_kernels.numbers` therefore does itself.

When one of the first two fails, Triton has been mended, and what works around it can go.
"""

import torch
import triton
import triton.language as tl
from kvmix_kernels.runtime.triton_numbers import dot, round_to, to_float32


@triton.jit
def multiply(a, b, out, OURS: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x, y, zero = tl.load(a + at), tl.load(b + at), tl.zeros([16, 16], tl.float32)
    tl.store(out + at, dot(x, y, zero) if OURS else tl.dot(x, y, zero))


@triton.jit
def convert(x, narrow, wide, OURS: tl.constexpr):
    at = tl.arange(0, 256)
    value = tl.load(x + at)
    rounded = round_to(value, tl.bfloat16) if OURS else value.to(tl.bfloat16)
    tl.store(narrow + at, rounded)
    tl.store(wide + at, to_float32(rounded))


def product(ours):
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    multiply[(1,)](a, b, out, ours)
    return out, a.float() @ b.float()


def conversion(ours):
    torch.manual_seed(0)
    x = torch.randn(256) * torch.logspace(-42, 30, 256)
    x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    narrow, wide = torch.empty(256, dtype=torch.bfloat16), torch.empty(256)
    convert[(1,)](x, narrow, wide, ours)
    return narrow, wide, x.bfloat16()


def test_the_interpreter_multiplies_the_bits_of_bfloat16():
    got, expected = product(ours=False)
    assert not torch.allclose(got, expected, rtol=0.1)


def test_the_interpreter_truncates_to_bfloat16():
    assert not torch.equal(conversion(ours=False)[0][4:], conversion(ours=False)[2][4:])


def test_we_multiply_bfloat16():
    torch.testing.assert_close(*product(ours=True))


def test_we_round_to_bfloat16_and_back_bit_for_bit():
    narrow, wide, expected = conversion(ours=True)
    torch.testing.assert_close(narrow, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, expected.float(), rtol=0, atol=0, equal_nan=True)
