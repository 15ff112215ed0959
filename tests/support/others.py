"""Caches of other packages, as far as they are installed."""

from types import SimpleNamespace

import pytest
import torch


def need_quanto():
    """Skip the test without optimum-quanto; unpack its codes in PyTorch: its extension takes long to compile."""
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions.extension import get_extension

    get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=_unpack)


def _unpack(packed, bits):
    """Codes of all bytes: first the lowest bits of each, then the next."""
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])
