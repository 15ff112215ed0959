"""Decoding of words to bfloat16 numbers, without a conversion.

Masked into the mantissa of a bfloat16 1.0, a code of at most 4 bits at bit position p *is* the number
`1 + code * 2^(p-7)`: one logical instruction for two codes, and one shift for as many fields as fit the 7 bits. 8 bits
do not fit: their number is `code - 128`, which takes three instructions for two codes.
"""

import triton
import triton.language as tl

from ...runtime.triton_numbers import INTERPRETED
from .steps import LEAST_STEP, padded_of, share_of


@triton.constexpr_function
def bits_of(layout):
    """Return the bits of a code."""
    return layout.bits


@triton.constexpr_function
def low_of(layout):
    """Return the bits of a field in the (low) plane."""
    return layout.planes[0]


@triton.constexpr_function
def number_of_zero(layout):
    """Return the number that code 0 becomes."""
    return -128.0 if layout.bits == 8 else 1.0


@triton.constexpr_function
def together_of(layout):
    """Return how many fields lie within a mantissa after the same shift: whole steps of them."""
    share = share_of(layout, LEAST_STEP)
    return ((7 - layout.bits) // layout.planes[0] + 1) // share * share


@triton.constexpr_function
def shift_of(field, layout):
    """Return how many bits to shift words to bring a field into the mantissa."""
    if layout.bits == 8:
        return 8 * field
    return field // together_of(layout) * together_of(layout) * layout.planes[0]


@triton.constexpr_function
def field_mask(field, layout):
    """Return the mask of a field of the (low) plane after the shift."""
    if layout.bits == 8:
        return 0x7F
    return (2 ** layout.planes[0] - 1) << field * layout.planes[0] - shift_of(field, layout)


@triton.constexpr_function
def assembly(field, layout):
    """Return PTX from two words `$1` (high plane: `$3`) to two bfloat16 `$0`; `$2` (`$4`) masks after the shift."""
    shift = shift_of(field, layout)
    lines = [f"shr.b32 a, $1, {shift};" if shift else "mov.b32 a, $1;"]
    if layout.bits == 8:
        lines += [
            "lop3.b32 b, a, 0x00800080, 0x43004300, 0xAE;",  # (~a & mask) | 128: 256 or, where the bit is set, 128
            "lop3.b32 a, a, $2, 0x43004300, 0xEA;",  # (a & mask) | 128: 128 to 255
            "mov.b32 minus, 0xBF80BF80;",
            "fma.rn.bf16x2 a, b, minus, a;",  # a - b
        ]
    else:
        lines += ["lop3.b32 a, a, $2, 0x3F803F80, 0xEA;"]  # (a & mask) | 1.0
    if layout.bits == 3:
        lines += [f"shl.b32 b, $3, {2 - shift};" if shift < 2 else f"shr.b32 b, $3, {shift - 2};"]
        lines += ["lop3.b32 a, b, $4, a, 0xEA;"]
    return "{ .reg .b32 a, b, minus; " + " ".join(lines) + " mov.b32 $0, a; }"


@triton.jit
def unit_of(at, LAYOUT: tl.constexpr, POWER: tl.constexpr):
    """Return how much a code of 1 adds to its number, for places in the order of steps; with `POWER` -1 the inverse."""
    if bits_of(LAYOUT) == 8:
        return tl.full(at.shape, 1.0, tl.float32)
    position = at // padded_of(LAYOUT) % together_of(LAYOUT) * low_of(LAYOUT)
    return tl.exp2((POWER * (position - 7)).to(tl.float32))


@triton.jit
def decode(low, high, FIELD: tl.constexpr, LAYOUT: tl.constexpr, STEP: tl.constexpr):
    """Decode the numbers `[columns, STEP]` of a step from this field on.

    Args:
        low: words of the (low) plane, int16.
        high: of 3 bits, the words of the high plane, shifted so that a code's high bit is where its field begins.
    """
    if INTERPRETED:
        return decode_plainly(low, high, FIELD, LAYOUT, STEP)
    mask = mask_of(FIELD, LAYOUT, STEP)
    if bits_of(LAYOUT) == 3:
        return tl.inline_asm_elementwise(
            assembly(FIELD, LAYOUT),
            "=r,r,r,r,r",
            [low, mask, high, _above(mask)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return tl.inline_asm_elementwise(
        assembly(FIELD, LAYOUT), "=r,r,r", [low, mask], dtype=tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit
def decode_plainly(low, high, FIELD: tl.constexpr, LAYOUT: tl.constexpr, STEP: tl.constexpr):
    """Decode without assembly, for the interpreter and as a check of the assembly."""
    SHIFT: tl.constexpr = shift_of(FIELD, LAYOUT)
    mask = mask_of(FIELD, LAYOUT, STEP)
    if bits_of(LAYOUT) == 8:
        return (((low.to(tl.int32) >> SHIFT) & 0xFF) - 128).to(tl.float32).to(tl.bfloat16)
    number = ((low.to(tl.int32) >> SHIFT) & mask) | 0x3F80
    if bits_of(LAYOUT) == 3:
        number = number | ((high.to(tl.int32) << 2 >> SHIFT) & _above(mask))
    return number.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def mask_of(FIELD: tl.constexpr, LAYOUT: tl.constexpr, STEP: tl.constexpr):
    """Return the masks of the fields of a step after the shift, `[1, STEP]`."""
    mask = tl.full([1, STEP], field_mask(FIELD, LAYOUT), tl.int16)
    if share_of(LAYOUT, STEP) > 1:
        mask = mask << (tl.arange(0, STEP) // padded_of(LAYOUT) * low_of(LAYOUT)).to(tl.int16)[None, :]
    return mask


@triton.jit
def _above(mask):
    """Return the one bit above fields of two bits."""
    return (mask & (mask << 1)) << 1
