"""The PTX that decodes words, followed instruction by instruction for every word: a GPU is not needed for its logic."""

import re

import pytest
import torch

pytest.importorskip("triton")
from kvmix_kernels import BITS, PageLayout
from kvmix_kernels.attend.triton.codes import assembly, field_mask, number_of_zero, shift_of
from kvmix_kernels.attend.triton.steps import fields_of

WORDS = torch.arange(65536)
OTHERS = WORDS[torch.randperm(65536, generator=torch.Generator().manual_seed(0))]


def halves(register):
    """The two bfloat16 of a register."""
    return [((register >> shift) & 0xFFFF).to(torch.int16).view(torch.bfloat16) for shift in (0, 16)]


def lop3(a, b, c, table):
    """PTX's definition: bit (a b c) of the table, for every bit."""
    chosen = torch.zeros_like(a)
    for case in range(8):
        if table >> case & 1:
            a_is, b_is, c_is = (value if case >> bit & 1 else ~value for value, bit in ((a, 2), (b, 1), (c, 0)))
            chosen |= a_is & b_is & c_is
    return chosen & 0xFFFFFFFF


def follow(text, operands):
    """Run the instructions on registers, which are int64 tensors of 32 bits."""
    registers = dict(operands)

    def value(name):
        return registers[name] if name in registers else torch.full_like(operands["$1"], int(name, 0))

    for name, rest in re.findall(r"([a-z][\w.]*) ([^;]+);", text.replace(".reg .b32 a, b, minus;", "")):
        target, *sources = (part.strip() for part in rest.split(","))
        if name == "mov.b32":
            registers[target] = value(sources[0])
        elif name == "shr.b32":
            registers[target] = value(sources[0]) >> int(sources[1])
        elif name == "shl.b32":
            registers[target] = value(sources[0]) << int(sources[1]) & 0xFFFFFFFF
        elif name == "lop3.b32":
            registers[target] = lop3(*(value(source) for source in sources[:3]), int(sources[3], 0))
        elif name == "fma.rn.bf16x2":
            parts = zip(*(halves(value(source)) for source in sources), strict=True)
            low, high = (
                (a.double() * b.double() + c.double()).bfloat16().view(torch.int16).long() for a, b, c in parts
            )
            registers[target] = (low & 0xFFFF) | (high & 0xFFFF) << 16
        else:
            raise AssertionError(f"{name} is not known here")
    return registers["$0"]


@pytest.mark.parametrize("bits", BITS)
def test_every_word_becomes_the_numbers_of_its_codes(bits):
    layout = PageLayout("value", bits, 128, 128)
    width = layout.planes[0]
    high_words = WORDS.flip(0), OTHERS.flip(0)
    for field in range(fields_of(layout)):
        mask = field_mask(field, layout)
        high_mask = mask & mask << 1
        registers = {
            "$1": WORDS | OTHERS << 16,
            "$2": torch.full_like(WORDS, mask * 0x10001),
            "$3": high_words[0] | high_words[1] << 16,
            "$4": torch.full_like(WORDS, (high_mask << 1) * 0x10001),
        }
        unit = 1.0 if bits == 8 else 2.0 ** (field * width - shift_of(field, layout) - 7)
        results = halves(follow(assembly(field, layout), registers))
        for number, low, high in zip(results, (WORDS, OTHERS), high_words, strict=True):
            code = low >> field * width & (1 << width) - 1
            if bits == 3:
                code = code | (high >> field * width & 1) << 2
            assert torch.equal(number.double(), number_of_zero(layout) + code * unit)
