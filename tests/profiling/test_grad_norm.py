"""The score against plain autograd, and what the probe leaves behind: nothing."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from architectures import build
from profiling_models import FAMILIES, load, token_ids, wrap
from torch import nn
from transformers import AutoModelForCausalLM

from kvmix_cli.errors import ModelError
from kvmix_cli.profiling import gradients
from kvmix_cli.profiling.measure import shared_pass
from kvmix_cli.profiling.probes.grad_norm import GradNorm

RTOL = {torch.float64: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Against float64. Models compute their loss in float32; those in half precision round everything in between."""


class Norms(NamedTuple):
    k: float
    v: float


def measure(loaded, ids, probe=None, **settings):
    layers = shared_pass(loaded, [probe or GradNorm()], ids, **settings)["grad-norm"].layers
    return {index: Norms(pair.k.value, pair.v.value) for index, pair in layers.items()}


def loss_of(model, ids):
    """Next-token loss, written out: position t is scored on token t + 1."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
    return -logits.log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]].mean()


def naive(model, ids):
    """Norms of a Llama's layers, each gradient on its own."""
    norms = {}
    for index, layer in enumerate(model.model.layers):
        weights = [layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
        norms[index] = [torch.autograd.grad(loss_of(model, ids), weight)[0].norm().item() for weight in weights]
    return norms


def assert_close(found, expected, rtol):
    assert found.keys() == expected.keys()
    for index, pair in expected.items():
        assert list(found[index]) == pytest.approx(list(pair), rel=rtol)


@pytest.mark.parametrize("length", [2, 50])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_naive_autograd_for_each_sample(checkpointing, length):
    loaded = load("llama", torch.float64)
    samples = [token_ids(length, seed) for seed in (0, 1)]
    expected = [naive(loaded.model, ids) for ids in samples]
    for ids, norms in zip(samples, expected, strict=True):
        assert_close(measure(loaded, ids, checkpointing=checkpointing), norms, RTOL[torch.float64])


def probe_weights(loaded):
    layers = [layer.self_attn for layer in loaded.model.model.layers]
    return [projection.weight for layer in layers for projection in (layer.k_proj, layer.v_proj)]


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("phi3", lambda w: (w[32:48], w[48:64])),
        ("gpt2", lambda w: (w[:, 32:64], w[:, 64:96])),
        ("gpt_neox", lambda w: (w.view(4, 3, 8, 32)[:, 1], w.view(4, 3, 8, 32)[:, 2])),
        ("falcon, multi-query", lambda w: (w[32:40], w[40:48])),
        ("falcon, new", lambda w: (w.view(2, 4, 8, 32)[:, 2], w.view(2, 4, 8, 32)[:, 3])),
    ],
)
def test_fused_projections_are_cut(family, rows):
    loaded = load(family, torch.float64)
    names = ("qkv_proj.weight", "query_key_value.weight", "c_attn.weight")
    fused = [weight for name, weight in loaded.model.named_parameters() if name.endswith(names)]
    ids = token_ids(20)
    gradients = torch.autograd.grad(loss_of(loaded.model, ids), fused)
    expected = {index: [part.norm().item() for part in rows(gradient)] for index, gradient in enumerate(gradients)}
    assert_close(measure(loaded, ids), expected, RTOL[torch.float64])


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(family):
    """OPT and BLOOM have dropout in places that transformers' own checkpointing would wake up."""
    loaded = load(family)
    ids = token_ids(30)
    plain = measure(loaded, ids, checkpointing=False)
    assert min(min(pair) for pair in plain.values()) > 0
    assert measure(loaded, ids, checkpointing=True) == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    ids = token_ids(60)
    exact = measure(load("llama", torch.float64), ids)
    assert_close(measure(load("llama", dtype), ids), exact, RTOL[dtype])


def test_small_float16_gradients_survive(monkeypatch):
    """Without a scaled loss these would sink below float16's smallest numbers."""
    exact = measure(weak(load("llama", torch.float64)), token_ids(60))
    loaded = weak(load("llama", torch.float16))
    assert_close(measure(loaded, token_ids(60)), exact, RTOL[torch.float16])
    monkeypatch.setattr(gradients, "FLOAT16_LOSS_SCALE", 1.0)
    unscaled = measure(loaded, token_ids(60))
    assert unscaled[0].k != pytest.approx(exact[0].k, rel=10 * RTOL[torch.float16])


def weak(loaded):
    """The same model with outputs, and so with gradients, that are a hundred thousand times smaller."""
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(2**-8)
        loaded.model.model.norm.weight.mul_(2**-9)
    return loaded


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float16, "--dtype float32"), (torch.float32, "damaged")])
def test_overflow_is_an_error(dtype, advice):
    loaded = load("llama", dtype)
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match=f"overflow in {str(dtype)[6:]}.*{advice}"):
        measure(loaded, token_ids(20))


@dataclass
class Quantizer:
    """As much of one of transformers' quantizers as a probe looks at."""

    is_trainable: bool
    quantization_config: SimpleNamespace


@pytest.mark.parametrize(
    ("is_trainable", "dequantize", "refused"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_quantized_weights_that_pass_no_gradient_on_are_an_error(is_trainable, dequantize, refused):
    """gpt-oss in MXFP4: attention is in bfloat16, but what comes after it passes nothing on."""
    loaded = load("llama")
    settings = SimpleNamespace(quant_method=SimpleNamespace(value="mxfp4"), dequantize=dequantize)
    loaded.model.hf_quantizer = Quantizer(is_trainable, settings)
    if refused:
        with pytest.raises(ModelError, match=r"weights of small are quantized \(mxfp4\).*--score kl, loss or error"):
            measure(loaded, token_ids(20))
    else:
        assert min(measure(loaded, token_ids(20))[0]) > 0


class Packed(torch.Tensor):
    """A tensor with a class of its own, as torchao's, which has no gradient."""

    def requires_grad_(self, required=True):
        if not required:
            return self
        raise RuntimeError("only Tensors of floating point can require gradients")


def test_weights_in_a_class_of_their_own_are_scored_by_their_output():
    loaded, ids = load("llama"), token_ids(20)
    dense = measure(loaded, ids)
    projection = loaded.model.model.layers[1].self_attn.v_proj
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Packed), requires_grad=False)
    assert_close(measure(loaded, ids), dense, 1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sink_logits_are_differentiated(family):
    """In attention of our own, that is, which is native where no gradient is wanted."""
    norms = []
    for implementation in ("kvmix", "eager"):
        loaded = wrap(build(family, torch.float32))
        loaded.model.set_attn_implementation(implementation)
        norms.append(measure(loaded, token_ids(40)))
    assert_close(*norms, 1e-4)


def state(model):
    """Everything about a model that a probe might touch."""
    return {
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [parameter.grad for parameter in model.parameters()],
        "hooks": [parameter._post_accumulate_grad_hooks for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "forward": ["forward" in vars(module) for module in model.modules()],
        "weights": [parameter.detach().clone() for parameter in model.parameters()],
    }


def assert_same_state(before, after):
    for name in ("requires_grad", "training", "forward"):
        assert before[name] == after[name], name
    assert all(one is other for one, other in zip(before["grad"], after["grad"], strict=True))
    assert all(torch.equal(*pair) for pair in zip(before["weights"], after["weights"], strict=True))
    assert not any(after["hooks"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_restored(checkpointing):
    loaded = load("llama")
    weights = list(loaded.model.parameters())
    weights[3].requires_grad_(False)
    weights[2].grad = torch.ones_like(weights[2])
    before = state(loaded.model)
    measure(loaded, token_ids(20), checkpointing=checkpointing)
    assert_same_state(before, state(loaded.model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_restored_after_an_exception(checkpointing):
    loaded = load("llama")
    before = state(loaded.model)
    broken = loaded.model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(loaded, token_ids(20), checkpointing=checkpointing)
    broken.remove()
    assert_same_state(before, state(loaded.model))


def test_a_sample_after_a_failed_one_is_right():
    loaded = load("llama")
    expected = measure(loaded, token_ids(20))
    broken = loaded.model.model.layers[0].self_attn.k_proj.weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(loaded, token_ids(20, seed=5))
    broken.remove()
    assert measure(loaded, token_ids(20)) == expected


def test_a_layer_that_the_loss_does_not_touch_has_no_score():
    loaded = load("llama")
    layer = loaded.model.model.layers[1]
    assert min(measure(loaded, token_ids(20))[1]) > 0
    layer.forward = lambda hidden, **_: hidden
    assert measure(loaded, token_ids(20))[1] == (0, 0)


def test_a_gradient_that_was_there_is_not_added_to_the_score():
    loaded = load("llama")
    expected = measure(loaded, token_ids(20))
    for parameter in loaded.model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert measure(loaded, token_ids(20)) == expected


def test_works_where_gradients_are_off():
    loaded = load("llama")
    expected = measure(loaded, token_ids(20))
    with torch.no_grad():
        assert measure(loaded, token_ids(20)) == expected


def test_gradients_are_freed_as_they_come():
    """At the moment a gradient arrives, no other weight still has one."""
    loaded = load("llama")
    alive = []

    class Watching(GradNorm):
        def score(self, gradient):
            alive.append(sum(weight.grad is not None for weight in loaded.model.parameters()))
            return super().score(gradient)

    measure(loaded, token_ids(20), Watching())
    assert alive == [0] * len(probe_weights(loaded))


def test_device_map(tmp_path):
    """Accelerate replaces the forward of every module."""
    accelerate = pytest.importorskip("accelerate")
    plain = load("llama")
    plain.model.save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    accelerate.dispatch_model(mapped, {"": "cpu"}, force_hooks=True)
    assert hasattr(mapped.model.layers[0].self_attn.k_proj, "_hf_hook")
    loaded = type(plain)(mapped, plain.tokenizer, plain.info, plain.max_length)
    ids = token_ids(20)
    for checkpointing in (False, True):
        before = state(mapped)
        assert measure(loaded, ids, checkpointing=checkpointing) == measure(plain, ids)
        assert_same_state(before, state(mapped))


def test_large_models_are_checkpointed_by_default(monkeypatch):
    loaded = load("llama")
    runs = []
    loaded.model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    loaded.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    measure(loaded, token_ids(20))
    assert len(runs) == 2
    monkeypatch.setattr(gradients, "CHECKPOINTED_PARAMETERS", 1000)
    measure(loaded, token_ids(20))
    assert len(runs) == 5, "the layer is called once, and what is in it twice"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_is_an_error(error):
    loaded = load("llama")

    class Full(nn.Module):
        def forward(self, *args, **kwargs):
            raise error

    loaded.model.model.layers[1].mlp = Full()
    with pytest.raises(ModelError, match=r"no memory for a backward pass of 20 tokens.*--seq-len"):
        measure(loaded, token_ids(20))
