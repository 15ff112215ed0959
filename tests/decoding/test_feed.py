"""Known tokens fed through a cache."""

import pytest
import torch
from evaluating import tiny, uniform

from kvmix_cli.cache.mixed import MixedCache, unquantized_cache
from kvmix_cli.decoding.feed import document_loss, feed, prefill

IDS = list(range(100, 164))


def mixed(bits=2):
    return MixedCache.from_plan(uniform(bits), tiny().model.config, reserve=len(IDS))


def test_a_documents_loss_is_that_of_one_pass_if_nothing_is_quantized():
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        logits = tiny().model(ids, use_cache=False).logits[0].double()
    expected = -logits[32:-1].log_softmax(-1).gather(1, ids[0, 33:, None]).sum().item()
    found = document_loss(tiny(), unquantized_cache(tiny().config), IDS, prefix=32, step=8)
    assert found == pytest.approx(expected, rel=1e-4), "float32, summed in another order"


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5, 64])
def test_every_token_is_fed_once_and_in_order(step):
    cache = mixed()
    parts = [part for part, _ in feed(tiny(), cache, IDS, step)]
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(len(IDS)))
    assert cache.get_seq_length() == len(IDS)


def test_a_prefill_counts_nothing_as_read():
    cache = mixed()
    prefill(tiny(), cache, IDS)
    assert cache.attended.total == 0
