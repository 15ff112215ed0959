"""Taylor, Fisher and error against decoding token by token, written out densely in float64."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from architectures import VOCABULARY, build
from decoding import Decoding, packed_mask
from kvmix_kernels.quantize.naive import dequantize, quantize
from profiling_models import load, wrap
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface

from kvmix_cli.errors import ModelError, QuantizationError
from kvmix_cli.plan import CacheSettings
from kvmix_cli.plan.windows import Recent
from kvmix_cli.profiling import gradients
from kvmix_cli.profiling.grid import Grid
from kvmix_cli.profiling.measure import ProbeOptions, shared_pass
from kvmix_cli.profiling.probes.error import Error
from kvmix_cli.profiling.probes.fisher import Fisher
from kvmix_cli.profiling.probes.grad_norm import GradNorm
from kvmix_cli.profiling.probes.taylor import Taylor

CACHE = CacheSettings(page=16, sink=2, window=Recent(tokens=8))
GRID = Grid(bits=(2, 4), group_sizes=(16,), cache=CACHE)
TOKENS = 70
FAMILIES = ["llama", "qwen2", "phi3", "gemma2", "gpt_oss", "latent"]
"""Grouped heads; key biases of several hundred; a fused projection; sliding layers with a soft-cap; sink logits;
latents that the layer expands."""


def sample(tokens=TOKENS, seed=0):
    return torch.randint(3, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def first_reader():
    return int(packed_mask(TOKENS, CACHE).any(1).nonzero()[0])


READERS = TOKENS - 1 - first_reader()


def quantized(layout, states):
    """All pages that are packed by the end, through the codec."""
    states, sink, page = states.clone(), CACHE.sink, layout.page
    for start in range(sink, states.shape[2] - page + 1, page):
        old = states[:, :, start : start + page]
        states[:, :, start : start + page] = dequantize(*quantize(old, layout), layout, torch.float64)
    return states


def moving(kind, layout, share=1.0, head=slice(None)):
    """A change of one kind by a share of the quantization error, in all heads or one."""

    def change(each, states):
        if each != kind:
            return states
        error = torch.zeros_like(states)
        error[:, head] = (quantized(layout, states.detach()) - states.detach())[:, head]
        return states + share * error

    return change


def nothing(kind, states):
    return states


def summed_loss(loaded, ids, layer, change):
    with Decoding(loaded.model, CACHE, layer, change):
        logits = loaded.model(input_ids=ids, use_cache=False).logits[0, :-1]
    return cross_entropy(logits.double(), ids[0, 1:], reduction="sum")


def outputs(loaded, ids, layer, change):
    """The layer's attention output, `[1, H, T, D]`, and the logits."""
    with Decoding(loaded.model, CACHE, layer, change) as decoding:
        logits = loaded.model(input_ids=ids, use_cache=False).logits[0, :-1]
    return decoding.outputs[layer], logits


def cases(loaded):
    for layer in loaded.info.quantizable:
        for kind in ("key", "value"):
            for choice, layout in GRID.layouts(kind, loaded.info.heads(layer).dim(kind)).items():
                yield layer, kind, choice, layout


def found(measured, layer, kind):
    pair = measured.layers[layer]
    return pair.k if kind == "key" else pair.v


@pytest.fixture(params=FAMILIES)
def loaded(request):
    return wrap(build(request.param))


@pytest.mark.slow
def test_taylor_is_gradient_times_error(loaded):
    ids = sample()
    measured = shared_pass(loaded, [Taylor()], ids, GRID)["taylor"]
    for layer, kind, choice, layout in cases(loaded):
        share = torch.zeros((), dtype=torch.float64, requires_grad=True)
        loss = summed_loss(loaded, ids, layer, moving(kind, layout, share))
        slope = torch.autograd.grad(loss, share)[0].abs().item() / READERS
        assert found(measured, layer, kind).curve[choice] == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.slow
def test_taylor_is_the_slope_of_the_loss():
    loaded, ids, step = wrap(build("llama")), sample(), 1e-2
    measured = shared_pass(loaded, [Taylor()], ids, GRID)["taylor"]
    for layer, kind, choice, layout in cases(loaded):
        up, down = (summed_loss(loaded, ids, layer, moving(kind, layout, share)) for share in (step, -step))
        slope = ((up - down) / (2 * step)).abs().item() / READERS
        assert found(measured, layer, kind).curve[choice] == pytest.approx(slope, rel=1e-2, abs=2e-6)


@pytest.mark.slow
def test_error_is_the_relative_change_of_the_output(loaded):
    ids = sample()
    measured = shared_pass(loaded, [Error()], ids, GRID)["error"]
    readers = slice(first_reader(), TOKENS - 1)
    for layer, kind, choice, layout in cases(loaded):
        before = outputs(loaded, ids, layer, nothing)[0][:, :, readers]
        after = outputs(loaded, ids, layer, moving(kind, layout))[0][:, :, readers]
        expected = ((after - before).norm() / before.norm()).item()
        assert found(measured, layer, kind).curve[choice] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_fisher_squares_each_tokens_change(loaded, monkeypatch):
    ids, labels = sample(), sample(TOKENS - 1, seed=7)[0]
    monkeypatch.setattr(gradients, "drawn_loss", lambda logits, seed: cross_entropy(logits, labels))
    measured = shared_pass(loaded, [Fisher()], ids, GRID)["fisher"]
    for layer, kind, choice, layout in cases(loaded):
        before, logits = outputs(loaded, ids, layer, nothing)
        gradient = torch.autograd.grad(cross_entropy(logits.double(), labels, reduction="sum"), before)[0]
        after = outputs(loaded, ids, layer, moving(kind, layout))[0]
        by_token = torch.einsum("bhtd,bhtd->t", gradient, after - before)[:-1]
        expected = by_token.square().sum().item() / (2 * READERS)
        assert found(measured, layer, kind).curve[choice] == pytest.approx(expected, rel=1e-4)


def test_drawn_labels_follow_the_predictions():
    torch.manual_seed(0)
    logits = torch.randn(1, 5).expand(4000, 5)
    losses = [gradients.drawn_loss(logits, seed).item() for seed in (1, 1, 2)]
    entropy = -(logits[0].softmax(-1) * logits[0].log_softmax(-1)).sum().item()
    assert losses[0] == losses[1] != losses[2]
    assert losses == pytest.approx([entropy] * 3, rel=0.05)


@pytest.mark.slow
def test_scores_of_heads_are_of_a_change_in_that_head_alone():
    loaded, ids = wrap(build("llama")), sample()
    measured = shared_pass(loaded, [Error(), GradNorm()], ids, GRID, per_head=True)
    readers = slice(first_reader(), TOKENS - 1)
    for layer, kind, choice, layout in cases(loaded):
        if layout.bits != 2:
            continue
        before = outputs(loaded, ids, layer, nothing)[0][:, :, readers]
        for head in range(2):
            after = outputs(loaded, ids, layer, moving(kind, layout, head=head))[0][:, :, readers]
            both = slice(2 * head, 2 * head + 2)
            assert torch.equal(after[:, 2 - 2 * head : 4 - 2 * head], before[:, 2 - 2 * head : 4 - 2 * head])
            expected = ((after - before).norm() / before[:, both].norm()).item()
            assert found(measured["error"], layer, kind).heads[head] == pytest.approx(expected, rel=1e-5)
        norms = found(measured["grad-norm"], layer, kind)
        assert sum(norm**2 for norm in norms.heads) == pytest.approx(norms.value**2)
        assert found(measured["error"], layer, kind).value == found(measured["error"], layer, kind).curve[choice]


ALL = [GradNorm(), Taylor(), Fisher(), Error()]


def numbers(measured):
    return {name: each.layers for name, each in measured.items()}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_together_is_the_same_as_alone(loaded, checkpointing):
    together = shared_pass(loaded, ALL, sample(), GRID, checkpointing=checkpointing)
    alone = [shared_pass(loaded, [probe], sample(), GRID) for probe in ALL]
    for name, layers in numbers(together).items():
        expected = next(each for each in alone if name in each)[name].layers
        for index in loaded.info.quantizable:
            for one, other in zip(layers[index], expected[index], strict=True):
                assert one.value == pytest.approx(other.value, rel=1e-6)
                assert one.curve == pytest.approx(other.curve, rel=1e-6)
    assert all(each.seconds > 0 for each in together.values())


def test_half_precision_is_measured_in_float32():
    seen = []

    class Looking(Error):
        def cost(self, change):
            seen.extend([change.states, change.error, change.output, change.output_change])
            return super().cost(change)

    shared_pass(wrap(build("llama", torch.bfloat16)), [Looking()], sample(), GRID)
    assert {each.dtype for each in seen} == {torch.float32}


@pytest.mark.parametrize("implementation", ["sdpa", "kvmix", "eager"])
def test_attention_is_as_it_was(implementation):
    loaded = wrap(build("llama"))
    loaded.model.set_attn_implementation(implementation)
    before = loaded.model(sample()).logits
    shared_pass(loaded, ALL, sample(), GRID)
    assert loaded.model.config._attn_implementation == implementation
    assert torch.equal(loaded.model(sample()).logits, before)
    broken = loaded.model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shared_pass(loaded, ALL, sample(), GRID)
    broken.remove()
    assert loaded.model.config._attn_implementation == implementation
    assert all(parameter.grad is None and parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_registered(fails):
    known = [set(AttentionInterface().valid_keys()), set(AttentionMaskInterface().valid_keys())]
    loaded = wrap(build("llama"))
    if fails:
        loaded.model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        shared_pass(loaded, [Error()], sample(), GRID)
    assert [set(AttentionInterface().valid_keys()), set(AttentionMaskInterface().valid_keys())] == known


@pytest.mark.parametrize("probe", [Fisher(), Taylor(), Error()])
def test_damaged_weights_are_an_error(probe):
    loaded = wrap(build("llama", torch.float32))
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(torch.nan)
        loaded.model.model.layers[3].self_attn.o_proj.weight.fill_(torch.nan)
        loaded.model.model.layers[2].mlp.down_proj.weight.fill_(torch.nan)
    expected = r"finite in float32|overflow in float32|cannot hold"
    with pytest.raises((ModelError, QuantizationError), match=expected) as error:
        shared_pass(loaded, [probe], sample(), GRID)
    assert "\n" not in str(error.value)


def test_sliding_layers_are_left_alone():
    loaded = wrap(build("gemma2"))
    assert set(shared_pass(loaded, [Taylor()], sample(), GRID)["taylor"].layers) == {1, 3}


def test_an_error_needs_no_backward_pass(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("a backward pass"))
    shared_pass(wrap(build("llama")), [Error()], sample(), GRID)


def test_a_model_with_attention_of_its_own_cannot_be_observed():
    loaded = wrap(build("falcon"))
    with pytest.raises(ModelError, match=r"FalconForCausalLM computes attention on its own.*grad-norm"):
        shared_pass(loaded, [Error()], sample(), GRID)
    assert shared_pass(loaded, [GradNorm()], sample())["grad-norm"].layers.keys() == {0, 1, 2, 3}


def test_layers_that_choose_the_tokens_they_read_cannot_be_observed():
    loaded = wrap(build("latent, indexed", torch.float32))
    with pytest.raises(ModelError, match=r"layer 0 chooses the tokens that it reads .*grad-norm"):
        shared_pass(loaded, [Error()], sample(), GRID)
    assert not any("expand_kv" in vars(module) for module in loaded.model.modules()), "the model is as it was"


def test_attention_that_does_not_say_which_layer_it_is_cannot_be_seen():
    loaded = wrap(build("llama"))
    loaded.model.model.layers[2].self_attn.layer_idx = None
    with pytest.raises(ModelError, match=r"the attention of layer 2 of small cannot be seen: use --score grad-norm"):
        shared_pass(loaded, [Error()], sample(), GRID)


def test_heads_that_cannot_be_packed_are_an_error():
    with pytest.raises(ModelError, match="head_dim must be a positive multiple of 16, got 8"):
        shared_pass(load("llama"), [Error()], sample(), GRID)


def test_keys_beyond_the_scales_are_an_error():
    loaded = wrap(build("llama", torch.float32))
    with torch.no_grad():
        loaded.model.model.layers[2].self_attn.k_proj.weight.mul_(1e6)
    with pytest.raises(QuantizationError, match=r"layer 2 keys reach .*, which float16 scales cannot hold"):
        shared_pass(loaded, [Taylor()], sample(), GRID)


def test_groups_that_are_one_choice_are_measured_once():
    grid = Grid(bits=(4, 2), group_sizes=(32, 8, 64, "row"), cache=CACHE)
    assert list(grid.layouts("key", 16)) == ["2g8", "2g16", "4g8", "4g16"]
    assert list(grid.layouts("value", 48)) == ["2g8", "2g32", "2g48", "4g8", "4g32", "4g48"]


def test_curves_are_measured_with_the_encoder_that_was_asked_for():
    loaded, costs = wrap(build("llama")), {}
    for encode in ("minmax", "fitted"):
        assert ProbeOptions(encode=encode).grid(Error()).cache.encode == encode
        grid = replace(GRID, cache=CACHE.model_copy(update={"encode": encode}))
        measured = shared_pass(loaded, [Error()], sample(), grid)["error"]
        costs[encode] = [layer.v.curve["2g16"] for layer in measured.layers.values()]
    assert all(after < before for before, after in zip(costs["minmax"], costs["fitted"], strict=True))
