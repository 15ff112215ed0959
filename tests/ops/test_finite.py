"""What is known of scales that are not finite, and when: at once on a CPU, with the copy that has arrived on a GPU."""

from copy import deepcopy

import pytest
import torch
from kvmix_kernels import PageLayout
from kvmix_kernels.quantize import finite, quantize
from kvmix_kernels.quantize.finite import FiniteWatch

GOOD, BAD = torch.ones(2, 3, dtype=torch.float16), torch.tensor([1.0, torch.nan], dtype=torch.float16)


class Copy:
    """A copy to the host that takes until `pass_` is called; what it brings is what was sent last."""

    def __init__(self):
        self.waited = 0
        self.sent, self.arrived = torch.zeros((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)
        self.has_passed = False

    def pass_(self):
        self.has_passed = True
        self.arrived.copy_(self.sent)

    def query(self):
        return self.has_passed

    def synchronize(self):
        self.waited += not self.has_passed
        self.pass_()


@pytest.fixture
def copy(monkeypatch):
    """A GPU that is not here."""
    copy = Copy()

    class Pinned:
        def copy_(self, flag, non_blocking):
            assert non_blocking
            copy.sent.copy_(flag)

        def __bool__(self):
            return bool(copy.arrived)

    def record(device):
        copy.has_passed = False
        return copy

    monkeypatch.setattr(finite, "_answers_at_once", lambda device: False)
    monkeypatch.setattr(finite, "_pinned", Pinned)
    monkeypatch.setattr(finite, "_record", record)
    return copy


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e6])
def test_a_cpu_knows_at_once(value):
    watch, layout = FiniteWatch(), PageLayout("key", 2, 16, 16)
    pages = torch.randn(1, 1, 1, 16, 16)
    assert not watch.watch(quantize(pages, layout)[1])
    pages[..., 3, 5] = value
    assert watch.watch(quantize(pages, layout)[1])
    assert watch.watch(GOOD), "it stays known"
    assert watch.is_bad()


def test_nothing_watched_is_not_bad():
    assert not FiniteWatch().is_bad(wait=True)


def test_a_gpu_is_not_waited_for(copy):
    watch = FiniteWatch()
    assert not watch.watch(BAD)
    assert not watch.is_bad()
    copy.pass_()
    assert watch.watch(GOOD)
    assert copy.waited == 0


def test_what_is_found_while_a_copy_is_on_its_way_is_not_lost(copy):
    watch = FiniteWatch()
    for scales in (GOOD, BAD, GOOD):
        assert not watch.watch(scales)
    copy.pass_()
    assert watch.is_bad()
    assert copy.waited == 0


def test_a_copy_knows_everything(copy):
    watch = FiniteWatch()
    watch.watch(BAD)
    assert deepcopy(watch).is_bad()
    assert not deepcopy(FiniteWatch()).is_bad()


def test_whoever_must_know_waits(copy):
    watch = FiniteWatch()
    assert not watch.watch(BAD)
    assert watch.is_bad(wait=True)
    assert copy.waited == 1
    assert watch.is_bad(wait=True)
    assert copy.waited == 1, "nothing is on its way any more"
