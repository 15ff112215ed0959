"""vLLM's CPU engine with a plan: tokens, capacity and ranks, against our own cache. `make test-vllm` runs these."""

import pytest
import torch
from coding import coded_plan
from transformers import AutoModelForCausalLM

from kvmix_cli.cache.in_engine import TokenwiseCache
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, Plan, TransformTensor

pytestmark = pytest.mark.engine
MIXED = "0:k8v4,1:k4v4,2-3:k3v2,4:k2v3,5-6:k4v2,7:k16v8"
THREE = "0-7:k3v2"
"""3 stored bits: heads of 64 channels are one group each, which adds half a bit."""
TIE = 0.02
"""Difference of two logits below which sums in another order may choose the other token. Coefficients are rounded to 16
bits on both sides, and a code at a boundary moves by a whole step."""


@pytest.fixture(scope="session")
def reference(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="session")
def prompts():
    """50 prompts of 1 to 550 tokens, every fifth of which begins with the same 150."""
    draw = torch.Generator().manual_seed(1)
    prefix = torch.randint(3, 4096, (150,), generator=draw).tolist()
    lengths = torch.randint(1, 400, (50,), generator=draw).tolist()
    tails = [torch.randint(3, 4096, (length,), generator=draw).tolist() for length in lengths]
    return [(prefix if index % 5 == 0 else []) + tail for index, tail in enumerate(tails)]


@pytest.fixture(scope="session")
def plans(model, reference, tmp_path_factory):
    """Files of plans of each kind, by name."""
    folder, info = tmp_path_factory.mktemp("plans"), model_info(reference.config, str(model))
    rope = 1 / 10_000 ** (torch.arange(32) / 32)
    made = {
        "mixed": Plan.from_short(MIXED, info, CacheSettings(group_size=32)),
        "three": Plan.from_short(THREE, info),
        "coded": at_full_pages(coded_plan(reference, folder, rope=rope)),
    }
    return {name: plan.save(folder / f"{name}.yaml") for name, plan in made.items()}


def at_full_pages(plan):
    """The same plan with a relative basis, as plan files have it, and frames that are whole blocks of the engine."""
    transform = plan.cache.transform
    settings = transform.model_copy(update={"basis": transform.basis.rsplit("/", 1)[-1]})
    return Plan.build(plan.model, plan.layers, plan.cache.model_copy(update={"transform": settings}))


@torch.inference_mode()
def differing(reference, plan, prompts, answers):
    """Logit gaps, one for each sequence whose tokens are not those that our cache leads to, at the first such token."""
    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        cache, ids = TokenwiseCache.from_plan(plan), torch.tensor([prompt])
        for token in answer:
            logits = reference(input_ids=ids, past_key_values=cache).logits[0, -1]
            best = int(logits.argmax())
            if best != token:
                gaps.append((logits[best] - logits[token]).item())
                break
            ids = torch.tensor([[best]])
    return gaps


@pytest.mark.parametrize(("name", "ranks"), [("mixed", 1), ("coded", 1), ("mixed", 2)])
def test_greedy_tokens_are_those_of_our_cache(name, ranks, plans, reference, prompts, ask):
    """Two rounds: the second finds the prompts' blocks in the engine's prefix cache."""
    options = {"tensor_parallel_size": ranks} if ranks > 1 else {}
    options |= {"block_size": 64} if name == "coded" else {}
    got = ask(plans[name], prompts, **options)
    assert sum(got["cached"]) > 0
    for answers in got["tokens"]:
        gaps = differing(reference, Plan.load(plans[name]), prompts, answers)
        assert len(gaps) <= 2
        assert max(gaps, default=0) < TIE


@pytest.mark.parametrize("name", ["mixed", "coded"])
def test_the_engine_says_what_it_holds_otherwise(name, plans, prompts, ask):
    said = ask(plans[name], prompts, **({"block_size": 64} if name == "coded" else {}))["said"]
    (line,) = {line for line in said.splitlines() if line.startswith("kvmix: ")}
    assert line.startswith("kvmix: the engine stores every token by itself: ")


def token_bytes(plan):
    """What a plan says that a token of all layers takes where every token stands alone, in a float32 model."""
    total = 0
    for index, layer in plan.layers.items():
        heads = plan.model.heads(index)
        for tensor, kind in layer.tensors:
            if isinstance(tensor, TransformTensor):
                total += sum(map(sum, tensor.runs)) + (2 * heads.kv_heads if kind == "value" else 0)
            elif tensor.bits == 16:
                total += 4 * heads.elements(kind)
            else:
                total += heads.elements(kind) * (tensor.bits / 8 + 4 / min(plan.cache.group_size, heads.dim(kind)))
    return total


@pytest.mark.parametrize("name", ["mixed", "coded"])
def test_capacity_is_the_plans_bytes(name, plans, prompts, ask):
    """The engine reports as many blocks as fit by the plan's own count, within 1 %."""
    got = ask(plans[name], prompts, **({"block_size": 64} if name == "coded" else {}))
    expected = got["bytes"] / (token_bytes(Plan.load(plans[name])) * got["block"])
    assert got["blocks"] == pytest.approx(expected, rel=0.01)


def test_three_stored_bits_hold_more_than_four_times_as_much_as_bfloat16(plans, prompts, ask):
    few = ask(plans["three"], prompts[:2], tokens=2, dtype="bfloat16")
    all_bits = ask(None, prompts[:2], tokens=2, dtype="bfloat16")
    assert few["blocks"] / all_bits["blocks"] == pytest.approx(16 / 3, rel=0.01)
