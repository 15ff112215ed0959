"""Before anything is measured, a forward of a few tokens proves the attention: causal, ours, and equal to its own."""

import warnings

import architectures
import pytest
import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache

from kvmix_cli.cache import attention as ours
from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.errors import ModelError, PolicyError
from kvmix_cli.models import attention
from kvmix_cli.models.attention import are_equal, set_attention, text_attention, use_attention
from kvmix_cli.models.causality import trial_logits
from kvmix_cli.models.geometry import model_info


@pytest.fixture
def model():
    return architectures.build("llama", torch.float32)


def use(model):
    own = trial_logits(model, DynamicCache(config=model.config))
    use_attention(model, "kvmix", model_info(model.config, "m"), own)
    return text_attention(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in architectures.CONFIGS if name != "falcon"])
def test_right_families_are_proved(name, dtype):
    """Gemma 2 and GPT-OSS with soft-caps and sinks, Qwen2 with key biases; in bfloat16 rounding is allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use(architectures.build(name, dtype)) == "kvmix"


def test_the_proof_leaves_no_trace(model):
    before = AttentionInterface._global_mapping["kvmix"]
    use(model)
    assert AttentionInterface._global_mapping["kvmix"] is before is ours.kvmix_attention


def test_another_prediction_is_found(model, monkeypatch):
    """An attention that scales scores otherwise than the model does."""

    def wrong(module, query, key, value, mask, **options):
        return ours.kvmix_attention(module, query, key, value, mask, **{**options, "scaling": 1.0})

    monkeypatch.setitem(AttentionInterface._global_mapping, "kvmix", wrong)
    with pytest.warns(UserWarning, match="LlamaForCausalLM predicts something else with .* 'kvmix' and keeps 'sdpa'"):
        assert use(model) == "sdpa"


def test_an_attention_that_does_not_run_is_found(model, monkeypatch):
    def failing(*args, **options):
        raise PolicyError("no")

    monkeypatch.setitem(AttentionInterface._global_mapping, "kvmix", failing)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM does not run \(no\) with .* and keeps 'sdpa'"):
        assert use(model) == "sdpa"


def test_layers_that_attend_on_their_own_are_named(model, monkeypatch):
    layer = model.model.layers[2].self_attn
    layer.config = type(layer.config).from_dict(layer.config.to_dict())
    layer.config._attn_implementation = "sdpa"
    with pytest.warns(UserWarning, match="LlamaForCausalLM computes the attention of layer 2 on its own"):
        assert use(model) == "kvmix"


def test_a_model_that_does_not_run_with_our_cache_is_refused(model, monkeypatch):
    def update(*args, **options):
        raise RuntimeError("shapes do not match")

    own = trial_logits(model, DynamicCache(config=model.config))
    monkeypatch.setattr(MixedCache, "update", update)
    with pytest.raises(ModelError, match="LlamaForCausalLM of m does not run with a kvmix cache: shapes do not match"):
        use_attention(model, "kvmix", model_info(model.config, "m"), own)


def test_running_out_of_memory_is_no_fault_of_the_attention(model, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setitem(AttentionInterface._global_mapping, "kvmix", full)
    with pytest.raises(ModelError, match="no memory to run 3 tokens through m"):
        use(model)


def test_rounding_is_no_difference_and_a_mask_is():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 50)
    assert are_equal(logits, logits + 1e-4 * torch.randn_like(logits), torch.float32)
    assert are_equal(logits, logits + 1e-2 * torch.randn_like(logits), torch.bfloat16)
    assert not are_equal(logits, logits + 0.2 * torch.randn_like(logits), torch.bfloat16)
    one = logits.clone()
    one[0, 3] = 0  # a token that rounding sent to another expert
    assert are_equal(logits, one, torch.float32)
    assert are_equal(logits, torch.full_like(logits, torch.nan), torch.float32), "damaged weights: others say so"
    assert not are_equal(logits, torch.empty(0), torch.float32)


def test_attention_of_the_text_part_is_switched_alone():
    import multimodal
    import transformers

    config = multimodal.config_of("gemma3", multimodal.tokenizer_of("gemma3"))
    model = transformers.AutoModelForImageTextToText.from_config(config)
    assert set_attention(model, "kvmix")
    assert (text_attention(model), model.config.vision_config._attn_implementation) == ("kvmix", "sdpa")
    assert attention._text_only(model.config, "x") == {"": "x", "text_config": "x"}
