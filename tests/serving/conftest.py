"""Engines that tests of serving start: each in a process of its own, once for all tests that ask for the same."""

import argparse
import inspect
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import PATIENCE, environment
from tokenizers import Tokenizer

from kvmix_cli.models.geometry import model_info
from kvmix_cli.plan import CacheSettings, LayerPlan, Plan, TransformSettings, TransformTensor
from kvmix_cli.plan.tensors.basis import BasisFile, LayerBasis
from kvmix_cli.plan.tensors.moments import Rope

ROOT = Path(__file__).parents[2]
FINE = "0:k8v8,1:k8v4,2:k16v8,3-6:k8v8,7:k8v16"
LOW = "0:k8v4,1:k4v4,2-3:k3v2,4:k2v3,5-6:k4v2,7:k16v8"
THREE = "0-7:k3v2"
"""3 stored bits: heads of 64 channels are one group each, which adds half a bit."""
SEQUENCES = 50
FOR_ENGINES = ("--score", "fisher-metric", "--window", "none")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The built-in model as a folder."""
    folder = tmp_path_factory.mktemp("engine") / "tiny"
    shutil.copytree(ROOT / "kvmix_cli" / "assets" / "tiny", folder)
    return folder


@pytest.fixture(scope="session")
def ask(model, tmp_path_factory):
    """A function that starts an engine and returns what tests/support/engine.py wrote about its answers."""
    answers = {}

    def asked(plan, prompts, tokens=16, record=None, variables=(), **options):
        key = json.dumps([str(plan), str(record), sorted(variables), options], sort_keys=True)
        if key not in answers:
            wanted = {"prompts": prompts, "tokens": tokens, "record": record and str(record), "options": options}
            file = tmp_path_factory.mktemp("answers") / "answer.json"
            # One process where one rank is enough: a start imports vLLM once instead of three times.
            alone = {} if options.get("tensor_parallel_size", 1) > 1 else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            ran = subprocess.run(
                [sys.executable, str(ROOT / "tests" / "support" / "engine.py"), str(file)],
                input=json.dumps({"model": str(model), **wanted}),
                env=environment(plan, **alone, **dict(variables)),
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            assert ran.returncode == 0, ran.stderr[-4000:]
            answers[key] = {**json.loads(file.read_text()), "said": ran.stderr}
        return answers[key]

    return asked


@pytest.fixture(scope="session")
def reference(model):
    """The built-in model in transformers, in float32."""
    from transformers import AutoModelForCausalLM

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
    return {name: plan.save(folder / f"{name}.yaml") for name, plan in made.items()} | {"sink": for_engines(model)}


def for_engines(model):
    """Transform codes for an engine, which keeps the first token of a sequence, as a user makes them."""
    profile, plan = (str(model.parent / name) for name in ("profile.yaml", "sink.yaml"))
    run(
        "profile",
        str(model),
        *FOR_ENGINES,
        "--samples",
        "2",
        "--seq-len",
        "512",
        "--dtype",
        "float32",
        "--out",
        profile,
    )
    run("allocate", "--profile", profile, "--stored-bits", "5.5", "--out", plan)
    return Path(plan)


def run(*words):
    """A command of kvmix."""
    ran = subprocess.run(
        [sys.executable, "-m", "kvmix_cli", *words, "--quiet"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]


@torch.inference_mode()
def coded_plan(reference, info, prompt, folder):
    """Transform codes along the principal axes of the keys and values of one prompt, with frames of one block."""
    from transformers import DynamicCache

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
