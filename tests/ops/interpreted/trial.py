"""The trials of the real kernels: all pass."""

import pytest
import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.attend import AttentionProblem
from kvmix_kernels.attend.triton import attend, is_trusted, unsupported
from kvmix_kernels.attend.triton import trial as attending
from kvmix_kernels.quantize import triton as quantizing
from kvmix_kernels.segments import Segments
from poisoned import channels, in_a_poisoned_buffer, packed, segments, segments_in_tiers, tiers

CPU = torch.device("cpu")
KEY, VALUE = PageLayout("key", 2, 64, 64, 32), PageLayout("value", 3, 64, 64, 32)


@pytest.mark.filterwarnings("error::UserWarning")
def test_first_trials_pass():
    assert quantizing.passes_first(CPU)
    assert all(attending.passes(kind) for kind in attending.first_kinds(CPU))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("form", "queries", "kinds"), [("full", 1, 1), ("sorted", 1, 1), ("tiers", 2, 3)])
def test_every_form_has_its_trial(form, queries, kinds, monkeypatch):
    monkeypatch.setattr(attending, "KV_HEADS", 1)
    value = segments("value", 3, 3, 2, 5, 64, 64, 32, torch.bfloat16, heads=1)
    states = torch.randn(2, 1, 128, 64).bfloat16()
    if form == "full":
        key = segments("key", 16, 3, 2, 5, 64, 64, 32, torch.bfloat16, heads=1)
    elif form == "sorted":
        key = Segments(value.sink, channels(((16, 16), (16, 4), (32, 2)), states, 64, 32), value.tail)
    else:
        tier = tiers([64, 9], 4)
        full = in_a_poisoned_buffer(states[:, :, :9])
        key, value = (
            segments_in_tiers(tier, [packed(states[:, :, :64], layout), full], 3, 5, 64, torch.bfloat16)
            for layout in (KEY, VALUE)
        )
    query = torch.randn(2, 4, queries, 64).bfloat16()
    problem = AttentionProblem(query, key, value, scaling=0.1)
    assert unsupported(problem) is None
    attending.passes.cache_clear()
    monkeypatch.setattr(attending, "first_kinds", lambda device: [])
    assert is_trusted(problem)
    assert attending.passes.cache_info().misses == kinds
    assert attend(problem)[0].isfinite().all()
