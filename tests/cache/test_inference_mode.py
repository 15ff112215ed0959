"""A cache filled under `torch.inference_mode()` can be used outside it, and the other way round.

Tensors made in inference mode can never be written outside it, so each case writes after the mode has changed what was
stored before: the tail, pages that grow, tiers, channel groups, tallies of attention, and rows of the batch.
"""

from contextlib import nullcontext

import pytest
import torch
from architectures import build
from composing import AXES, plan_for, quantized
from teaching import ids

from kvmix_cli.cache.baselines.casting import CastCache
from kvmix_cli.cache.baselines.rounding import FP8
from kvmix_cli.cache.buffer import Buffer
from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.observation import QuerySum
from kvmix_cli.cache.store import ROLLBACK

PLANS = {"pages": {}} | {axes: quantized(axes) for axes in AXES}
CHANGES = {
    "nothing": lambda cache: None,
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeated": lambda cache: cache.batch_repeat_interleave(2),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([1, 1])),
    "cropped": lambda cache: cache.crop(-10),
    "cropped into pages": lambda cache: cache.crop(-40),
    "offloaded": lambda cache: [(layer.offload(), layer.prefetch()) for layer in cache.layers],
    "reset": lambda cache: cache.reset(),
}


@pytest.fixture(scope="module")
def model():
    model = build("llama", torch.float32, wide=True)
    model.set_attn_implementation("kvmix")
    return model


def logits(model, plan, change, modes):
    """Feed a prompt, change the cache and decode, each in its mode; decoding fills the window and packs new pages."""
    prefill, changing, decoding = modes
    cache = MixedCache.from_plan(plan, model.config)
    with torch.no_grad():
        with prefill():
            model(ids(70 + ROLLBACK), past_key_values=cache)
            model(ids(3, seed=1), past_key_values=cache)
        with changing():
            change(cache)
        with decoding():
            batch = 4 if change is CHANGES["repeated"] else 2
            for step, count in enumerate((1, 60, 30, 1)):
                seen = model(ids(count, batch=batch, seed=step), past_key_values=cache).logits
        outside = model(ids(1, batch=batch), past_key_values=cache).logits
    return torch.cat([seen, outside], dim=1)


INSIDE, OUTSIDE = torch.inference_mode, nullcontext


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "change"),
    [(plan, "nothing") for plan in PLANS] + [("everything", change) for change in CHANGES if change != "nothing"],
)
def test_a_cache_goes_on_outside_of_the_mode_it_was_filled_in(model, plan, change):
    plan = plan_for(model, PLANS[plan], 2, 4)
    expected = logits(model, plan, CHANGES[change], (OUTSIDE, OUTSIDE, OUTSIDE))
    for modes in ((INSIDE, OUTSIDE, OUTSIDE), (INSIDE, INSIDE, OUTSIDE), (OUTSIDE, INSIDE, INSIDE)):
        got = logits(model, plan, CHANGES[change], modes)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # one arithmetic: float32 rounding at most


def test_generate_after_a_prefill_in_inference_mode(model):
    plan = plan_for(model, {}, 2, 2)
    prompt, answers = ids(100), []
    for mode in (INSIDE, OUTSIDE):
        cache = MixedCache.from_plan(plan, model.config)
        with torch.no_grad(), mode():
            model(prompt[:, :-1], past_key_values=cache)
        answers.append(
            model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=30)
        )
    assert torch.equal(*answers)


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_flow_to_queries_over_a_cache_filled_in_inference_mode(model, plan):
    cache = MixedCache.from_plan(plan_for(model, PLANS[plan], 8, 8), model.config)
    with torch.inference_mode():
        model(ids(70 + ROLLBACK), past_key_values=cache)
        model(ids(3, seed=1), past_key_values=cache)
    embedded = model.get_input_embeddings()(ids(1)).detach().requires_grad_()
    model(inputs_embeds=embedded, past_key_values=cache).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0
    assert not any(store.segments().tail.requires_grad for layer in cache.layers for store in layer.stores)


def test_a_buffer_grows_and_moves_outside():
    buffer = Buffer()
    with torch.inference_mode():
        buffer.append(torch.ones(2, 1, 3, 4))
        buffer.append(torch.ones(2, 1, 300, 4))
        buffer.apply(lambda data: data[[1]])
    buffer.drop_first(2)
    buffer.append(torch.zeros(1, 1, 1, 4))
    assert not buffer.view.is_inference()
    assert buffer.view.sum() == 301 * 4


def test_sums_over_queries_last():
    sums = QuerySum()
    with torch.inference_mode():
        sums.add(torch.ones(1, 2, 3, 5))
        sums.add(torch.ones(1, 2, 2, 6))
        sums.apply(lambda part: part[[0, 0]])
    sums.take_back(1)
    assert not sums.total.is_inference()
    assert sums.total[0, 0].tolist() == [4.0] * 5 + [1.0]


def test_a_baseline_goes_on_outside(model):
    cache = CastCache(FP8, model.config)
    with torch.inference_mode():
        model(ids(20), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        assert model(ids(1), past_key_values=cache).logits.isfinite().all()
