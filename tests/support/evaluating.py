"""What the evaluation tests share: the built-in model, short plans, and a task that needs no model."""

import copy
import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvmix_cli.cache.rotary import know_rotations
from kvmix_cli.evaluation.base import Sample, Task
from kvmix_cli.evaluation.bootstrap import ratio
from kvmix_cli.evaluation.results import Estimate, Metric
from kvmix_cli.models.geometry import model_info
from kvmix_cli.models.loading import load_model
from kvmix_cli.plan import CacheSettings, ModelInfo, Plan
from kvmix_cli.plan.windows import NoWindow
from kvmix_cli.ranks import ALONE

SHORT = CacheSettings(page=16, sink=0, group_size=16, window=NoWindow())
INFO = ModelInfo(id="builtin:tiny", layers=8, kv_heads=2, head_dim=64)


@functools.cache
def tiny():
    """The built-in model in float32 on the CPU; tests must not change it."""
    return load_model("builtin:tiny", device="cpu")


@functools.cache
def shallow():
    """The first two layers of the built-in model, where one way to read is compared with another; as little to change.

    Whatever holds of two layers holds of eight, which take three times as long.
    """
    whole = tiny()
    model = copy.deepcopy(whole.model)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    know_rotations(model)
    return replace(whole, model=model, info=model_info(model.config, whole.info.id))


def save_small(place, layers):
    """Save a model of a few narrow layers with random weights, and the heads and the tokenizer of builtin:tiny."""
    config = AutoConfig.for_model(**{**tiny().config.to_dict(), "num_hidden_layers": layers, "hidden_size": 64})
    config.intermediate_size, config.layer_types = 64, None
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place)
    tiny().tokenizer.save_pretrained(place)


def uniform(bits, cache=SHORT, info=None):
    return Plan.uniform(info or tiny().info, bits, bits, cache)


def save_plan(name, plan, folder="builtin--tiny"):
    """Save a plan where commands look for those of a model."""
    return plan.save(Path("profiles") / folder / "plans" / f"{name}.yaml")


def stand_in(**changes):
    """As much of a loaded model as the runner itself looks at."""
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="kvmix"))
    facts = {"dtype": "float32", "device": torch.device("cpu"), "info": INFO, "max_length": 4096, "prefill_chunk": None}
    model = changes.pop("model", model)
    has_weights = hasattr(model, "get_input_embeddings")
    facts["vocabulary"] = model.get_input_embeddings().weight.shape[0] if has_weights else 4096
    facts["check_ids"], facts["ranks"] = (lambda rows: None), ALONE
    return SimpleNamespace(**{"model": model, "config": getattr(model, "config", None), **facts, **changes})


def run_folder(root, plan, task="perplexity", model="builtin--tiny"):
    """The one run folder of a row."""
    (found,) = Path(root).glob(f"{task}__{model}__{plan}__????????")
    return found


class Counting(Task):
    """Measures nothing: a sample's number is its index, plus the plan's bits. Remembers what it was asked."""

    name = "counting"
    metrics = (Metric("number", higher_is_better=False), Metric("gain", higher_is_better=True, plans_only=True))
    default_limit = 4

    def __init__(self, before=lambda subject, sample: None, share=0.5):
        self.measured = []
        self.before = before
        self.share = share

    def samples(self, loaded, settings):
        return [Sample(str(number), (number,)) for number in range(self.limit(settings))]

    def measure(self, loaded, subject, sample, settings):
        self.before(subject, sample)
        self.measured.append((subject.name, sample.name))
        bits = 16 if subject.plan is None else subject.plan.bits.nominal
        quantized = 0 if subject.plan is None else 100 * self.share
        return {"tokens": 1, "number": sample.ids[0] + bits, "attended": {"total": 100, "quantized": quantized}}

    def summarise(self, records, reference, seed):
        numbers = [record["number"] for record in records]
        metrics = {"number": ratio(numbers, [1.0] * len(numbers), seed)}
        if reference is not None:
            metrics["gain"] = Estimate.exact(sum(other["number"] for other in reference) - sum(numbers))
        return metrics

    def describe(self, samples, settings):
        return f"{len(samples)} numbers"
