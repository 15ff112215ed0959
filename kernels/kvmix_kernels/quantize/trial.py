"""The trial of the Triton kernel that quantizes: bit for bit what the definition makes of random pages."""

from __future__ import annotations

import functools

import torch

from .. import trial
from ..layout import PageLayout
from . import naive, triton


def is_trusted(device: torch.device, layout: PageLayout, dtype: torch.dtype) -> bool:
    """Whether the kernel packs this right, as far as a trial can tell; if not, one warning names it."""
    return not trial.is_due() or passes(device, layout, dtype)


def first_layouts() -> list[PageLayout]:
    """A handful, tried before anything else on a device."""
    return [PageLayout("key", 2, 64, 64, 32), PageLayout("value", 3, 64, 64, 24)]


@functools.cache
def passes(device: torch.device, layout: PageLayout, dtype: torch.dtype) -> bool:
    """Whether the kernel packs this right; if not, one warning names it."""
    name = f"quantizing {layout.kind}s to {layout.bits} bits in groups of {layout.group} from {dtype}"
    return trial.passes(name.replace("torch.", ""), functools.partial(_failure, device, layout, dtype))


def _failure(device: torch.device, layout: PageLayout, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(trial.SEED)
    pages = torch.randn(1, 2, 2, layout.page, layout.head_dim, generator=generator)
    pages = pages.mul(torch.tensor([1e-7, 1.0]).view(1, 2, 1, 1, 1)).to(dtype)  # scales that are subnormal, and not
    expected = naive.quantize(pages, layout)
    got = triton.quantize(pages.to(device), layout)
    for name, one, other in zip(("words", "scales"), got, expected, strict=True):
        if not torch.equal(one.cpu().view(torch.int16), other.view(torch.int16)):
            return f"other {name} than the definition's"
    return None
