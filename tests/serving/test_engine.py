"""vLLM's CPU engine with a plan: tokens, capacity and ranks, against our own cache. `make test-vllm` runs these."""

import pytest
import torch

from kvmix_cli.cache.in_engine import TokenwiseCache
from kvmix_cli.plan import Plan, TransformTensor
from kvmix_cli.plan.engine_blocks import held_sink

pytestmark = pytest.mark.engine
FEW = 3
"""Sequences of 50 that may part from ours: sums in another order move a code at a boundary by a whole step, and what
follows is another text. test_stored.py shows that nothing else parts them."""
MORE = 25
"""The same of transform codes, whose steps are wider."""


@torch.inference_mode()
def parted(reference, plan, prompts, answers):
    """The number of sequences whose tokens are not all those that our cache leads to."""
    count = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        cache, ids = TokenwiseCache.from_plan(plan), torch.tensor([prompt])
        for token in answer:
            best = int(reference(input_ids=ids, past_key_values=cache).logits[0, -1].argmax())
            if best != token:
                count += 1
                break
            ids = torch.tensor([[best]])
    return count


@pytest.mark.parametrize(
    ("name", "ranks", "most"), [("fine", 1, FEW), ("coded", 1, MORE), ("sink", 1, MORE), ("fine", 2, FEW)]
)
def test_greedy_tokens_are_those_of_our_cache(name, ranks, most, plans, reference, prompts, ask):
    """Two rounds: the second finds the prompts' blocks in the engine's prefix cache."""
    options = {"tensor_parallel_size": ranks} if ranks > 1 else {}
    got = ask(plans[name], prompts, **options)
    assert sum(got["cached"]) > 0
    for answers in got["tokens"]:
        assert parted(reference, Plan.load(plans[name]), prompts, answers) <= most


@pytest.mark.parametrize(("name", "most"), [("fine", FEW), ("sink", MORE)])
def test_sequences_that_are_preempted_begin_anew_and_write_the_same(name, most, plans, reference, prompts, ask):
    """Half as many blocks as all sequences take together; what was evicted is read once more, sink included."""
    got = ask(plans[name], prompts, tokens=160, num_gpu_blocks_override=60, max_num_seqs=24)
    assert got["preemptions"] > 0
    answers = [answer[:16] for answer in got["tokens"][0]]
    assert parted(reference, Plan.load(plans[name]), prompts, answers) <= most


@pytest.mark.parametrize("name", ["fine", "coded"])
def test_the_engine_says_what_it_holds_otherwise(name, plans, prompts, ask):
    said = ask(plans[name], prompts)["said"]
    (line,) = {line for line in said.splitlines() if line.startswith("kvmix: the")}
    assert line.startswith("kvmix: the engine stores every token by itself: ")


def test_the_engine_holds_a_plan_for_engines_whole(plans, prompts, ask):
    assert "kvmix: the engine stores" not in ask(plans["sink"], prompts)["said"]


def token_bytes(plan, block):
    """What a plan says that a token of all layers takes where every token stands alone, in a float32 model."""
    total = 0
    for index, layer in plan.layers.items():
        heads = plan.model.heads(index)
        for tensor, kind in layer.tensors:
            if isinstance(tensor, TransformTensor):
                total += sum(map(sum, tensor.runs)) + (2 * heads.kv_heads if kind == "value" else 0)
                total += 4 * heads.elements(kind) * held_sink(plan) / block
            elif tensor.bits == 16:
                total += 4 * heads.elements(kind)
            else:
                total += heads.elements(kind) * (tensor.bits / 8 + 4 / min(plan.cache.group_size, heads.dim(kind)))
    return total


@pytest.mark.parametrize("name", ["fine", "low", "coded", "sink"])
def test_capacity_is_the_plans_bytes(name, plans, prompts, ask):
    """The engine reports as many blocks as fit by the plan's own count, within 1 %."""
    got = ask(plans[name], prompts)
    expected = got["bytes"] / (token_bytes(Plan.load(plans[name]), got["block"]) * got["block"])
    assert got["blocks"] == pytest.approx(expected, rel=0.01)


def test_three_stored_bits_hold_more_than_four_times_as_much_as_bfloat16(plans, prompts, ask):
    few = ask(plans["three"], prompts[:2], tokens=2, dtype="bfloat16")
    all_bits = ask(None, prompts[:2], tokens=2, dtype="bfloat16")
    assert few["blocks"] / all_bits["blocks"] == pytest.approx(16 / 3, rel=0.01)
