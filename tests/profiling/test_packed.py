"""Scores of packed weights come from output gradients, and equal those of the weights that they stand for."""

import importlib

import pytest
import torch
import transformers
from others import need_quanto
from profiling_models import FAMILIES, build_config, load, token_ids, wrap
from torch import nn

from kvmix_cli.errors import ModelError
from kvmix_cli.models import projections
from kvmix_cli.plan import CacheSettings
from kvmix_cli.plan.windows import Recent
from kvmix_cli.profiling.grid import Grid
from kvmix_cli.profiling.measure import shared_pass
from kvmix_cli.profiling.packed import check_differentiable
from kvmix_cli.profiling.probes.fisher import Fisher
from kvmix_cli.profiling.probes.grad_norm import GradNorm

IDS = token_ids(40)
GRID = Grid(bits=(2,), group_sizes=(16,), cache=CacheSettings(page=16, sink=2, window=Recent(tokens=8)))
WITH_LINEAR = [name for name in FAMILIES if not name.startswith(("gpt2", "gpt_bigcode"))]
"""Families whose projections are linear modules, not transposed ones, which no library packs."""


def scores(loaded, **options):
    return shared_pass(loaded, [GradNorm()], IDS, **options)["grad-norm"].layers


def values(layers):
    return torch.tensor([[pair.k.value, pair.v.value] for pair in layers.values()])


def as_if_packed(monkeypatch):
    monkeypatch.setattr(projections, "_dense", lambda module: None)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", WITH_LINEAR)
def test_output_gradients_give_the_weights_own_gradient(family, checkpointing, monkeypatch):
    """On dense weights both can be had: |g^T x| and the norm of the gradient are equal, of heads too."""
    if family.startswith("falcon") and checkpointing:
        pytest.skip("one way is enough for these variants")
    loaded = load(family)
    wanted = scores(loaded, per_head=True, checkpointing=checkpointing)
    as_if_packed(monkeypatch)
    found = scores(loaded, per_head=True, checkpointing=checkpointing)
    assert torch.allclose(values(found), values(wanted), rtol=1e-4), "float32 sums in another order"
    for one, other in zip(found.values(), wanted.values(), strict=True):
        assert one.k.heads == pytest.approx(other.k.heads, rel=1e-4)
        assert one.v.heads == pytest.approx(other.v.heads, rel=1e-4)


def test_nothing_stays_behind(monkeypatch):
    loaded = load("llama")
    as_if_packed(monkeypatch)
    scores(loaded)
    assert not any(module._forward_hooks for module in loaded.model.modules())
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def quantized(folder, settings):
    config = build_config("llama")
    config.hidden_size, config.head_dim, config.intermediate_size = 64, 16, 96
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32
    )
    return wrap(model.eval()), wrap(packed.eval())


def library(name):
    return pytest.importorskip(name, exc_type=ImportError)


SETTINGS = {
    "quanto, 8 bits": lambda: library("optimum.quanto") and transformers.QuantoConfig(weights="int8"),
    "quanto, 4 bits": lambda: need_quanto() or transformers.QuantoConfig(weights="int4"),
    "bitsandbytes, 8 bits": lambda: library("bitsandbytes") and transformers.BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, 4 bits": lambda: (
        library("bitsandbytes")
        and transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    ),
    "torchao, 8 bits": lambda: library("torchao") and transformers.TorchAoConfig(torchao("Int8WeightOnlyConfig")()),
}
FOUR_BITS = 0.5
"""Scores of a small random model change by so much with 4-bit weights; a real one's by less."""


def torchao(name):
    return getattr(importlib.import_module("torchao.quantization"), name)


@pytest.mark.parametrize("name", SETTINGS)
def test_packed_weights_are_scored_like_dense_ones(name, tmp_path):
    dense, packed = quantized(tmp_path, SETTINGS[name]())
    check_differentiable(packed)
    found = projections.find_projections(packed.model, packed.info)
    assert all(pair.k.weight is None and pair.v.weight is None for pair in found.values())
    one, other = values(scores(dense)), values(scores(packed))
    differences = ((one - other).abs() / one).flatten()
    assert differences.max() < (FOUR_BITS if "4" in name else 0.1)
    fisher = shared_pass(packed, [Fisher()], token_ids(60), GRID)["fisher"].layers
    assert all(pair.k.value > 0 for pair in fisher.values())


def test_a_format_whose_backward_pass_is_wrong_is_refused(tmp_path):
    """torchao's dynamic quantization of inputs says that it can be trained, and stops gradients at its rounding."""
    library("torchao")
    _, packed = quantized(tmp_path, transformers.TorchAoConfig(torchao("Int8DynamicActivationInt8WeightConfig")()))
    with pytest.raises(ModelError, match=r"quantized \(torchao\) and pass no gradient on"):
        check_differentiable(packed)


class Stopping(nn.Linear):
    """A linear module whose gradient ends at its input's rounding."""

    def forward(self, x):
        return super().forward(x.detach().round()) + 0 * x.sum()


class Refusing(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


class Quantizer:
    is_trainable = True

    class quantization_config:
        quant_method = "own"


@pytest.mark.parametrize(
    ("kind", "message"), [(Stopping, "pass a gradient on that is wrong by 100%"), (Refusing, "pass no gradient on")]
)
def test_gradients_are_tried_whatever_a_library_says(kind, message, monkeypatch):
    loaded = load("llama")
    for layer in loaded.model.model.layers:
        layer.mlp.up_proj.__class__ = kind
        layer.mlp.up_proj.requires_grad_(False)
    loaded.model.hf_quantizer = Quantizer()
    as_if_packed(monkeypatch)
    with pytest.raises(ModelError, match=message):
        shared_pass(loaded, [GradNorm()], IDS)
