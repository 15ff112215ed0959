"""vLLM's CPU engine with a plan: tokens, capacity and ranks, against our own cache. `make test-vllm` runs these."""

import argparse
import inspect
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, DynamicCache

from kvmix_cli.cache.in_engine import TokenwiseCache
from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TransformSettings, TransformTensor
from kvmix_cli.plan.basis import BasisFile, LayerBasis
from kvmix_cli.plan.moments import Rope

pytestmark = pytest.mark.engine
FINE = "0:k8v8,1:k8v4,2:k16v8,3-6:k8v8,7:k8v16"
LOW = "0:k8v4,1:k4v4,2-3:k3v2,4:k2v3,5-6:k4v2,7:k16v8"
THREE = "0-7:k3v2"
"""3 stored bits: heads of 64 channels are one group each, which adds half a bit."""
SEQUENCES = 50
FEW = 3
"""Sequences of 50 that may part from ours: sums in another order move a code at a boundary by a whole step."""
MORE = 25
"""The same at 2 and 3 bits, where a step is a third of a group's range: there even transformers in float32 parts from
itself in float64."""


@pytest.fixture(scope="session")
def reference(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="session")
def prompts(model):
    """50 prompts of code, of 1 to 550 tokens; every fifth begins with the same 150."""
    text = Tokenizer.from_file(str(model / "tokenizer.json")).encode(inspect.getsource(argparse)).ids
    draw, made = random.Random(1), []
    for index in range(SEQUENCES):
        count, start = draw.randrange(1, 400), draw.randrange(len(text) - 500)
        made.append((text[:150] if index % 5 == 0 else []) + text[start : start + count])
    return made


@pytest.fixture(scope="session")
def plans(model, reference, prompts, tmp_path_factory):
    """Files of plans of each kind, by name."""
    folder, info = tmp_path_factory.mktemp("plans"), model_info(reference.config, str(model))
    made = {
        "fine": Plan.from_short(FINE, info, CacheSettings(group_size=32)),
        "low": Plan.from_short(LOW, info, CacheSettings(group_size=32)),
        "three": Plan.from_short(THREE, info),
        "coded": coded_plan(reference, info, prompts[0], folder),
    }
    return {name: plan.save(folder / f"{name}.yaml") for name, plan in made.items()}


@torch.inference_mode()
def coded_plan(reference, info, prompt, folder):
    """Transform codes along the principal axes of the keys and values of one prompt, with frames of one block."""
    cache = DynamicCache()
    reference(input_ids=torch.tensor([prompt]), past_key_values=cache)
    layers = {
        index: {"k": principal_axes(layer.keys[0]), "v": principal_axes(layer.values[0])}
        for index, layer in enumerate(cache.layers)
    }
    rope = Rope(10_000 ** -(np.arange(32) / 32), "half", 0)
    basis = BasisFile(info.id, layers, 128, dict.fromkeys(layers, rope))
    transform = TransformSettings(basis="basis.safetensors", sha256=basis.save(folder / "basis.safetensors"), frame=128)
    digits = TransformTensor(widths=("66666665", "66666544"))
    layer = LayerPlan(k=digits, v=digits)
    return Plan.build(info, dict.fromkeys(range(info.layers), layer), CacheSettings(transform=transform))


def principal_axes(states):
    """The directions of `[H_kv, T, D]`."""
    states = states.double()
    mean = states.mean(1)
    values, axes = torch.linalg.eigh((states - mean[:, None]).mT @ (states - mean[:, None]) / states.shape[1])
    axes, deviation = axes.flip(-1), values.flip(-1).clamp(min=1e-8).sqrt()
    arrays = (axes.mT, axes, mean, deviation)
    return LayerBasis(*(np.ascontiguousarray(each.float().numpy()) for each in arrays))


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
    ("name", "ranks", "most"), [("fine", 1, FEW), ("coded", 1, MORE), ("fine", 2, FEW), ("low", 1, MORE)]
)
def test_greedy_tokens_are_those_of_our_cache(name, ranks, most, plans, reference, prompts, ask):
    """Two rounds: the second finds the prompts' blocks in the engine's prefix cache."""
    options = {"tensor_parallel_size": ranks} if ranks > 1 else {}
    got = ask(plans[name], prompts, **options)
    assert sum(got["cached"]) > 0
    for answers in got["tokens"]:
        assert parted(reference, Plan.load(plans[name]), prompts, answers) <= most


@pytest.mark.parametrize("name", ["fine", "coded"])
def test_the_engine_says_what_it_holds_otherwise(name, plans, prompts, ask):
    said = ask(plans[name], prompts)["said"]
    (line,) = {line for line in said.splitlines() if line.startswith("kvmix: the")}
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


@pytest.mark.parametrize("name", ["fine", "low", "coded"])
def test_capacity_is_the_plans_bytes(name, plans, prompts, ask):
    """The engine reports as many blocks as fit by the plan's own count, within 1 %."""
    got = ask(plans[name], prompts)
    expected = got["bytes"] / (token_bytes(Plan.load(plans[name])) * got["block"])
    assert got["blocks"] == pytest.approx(expected, rel=0.01)


def test_three_stored_bits_hold_more_than_four_times_as_much_as_bfloat16(plans, prompts, ask):
    few = ask(plans["three"], prompts[:2], tokens=2, dtype="bfloat16")
    all_bits = ask(None, prompts[:2], tokens=2, dtype="bfloat16")
    assert few["blocks"] / all_bits["blocks"] == pytest.approx(16 / 3, rel=0.01)
