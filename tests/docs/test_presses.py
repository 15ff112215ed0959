"""The script that compares presses of kvpress with plans: what a press leaves is read as if the rest were masked."""

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from kvmix_cli.cache.sizes import cache_nbytes
from kvmix_cli.models.loading import load_model
from kvmix_cli.plan import Plan

SCRIPT = Path(__file__).parents[2] / "examples" / "presses.py"
PROMPT, LATER = 40, 9


class EveryPress:
    """Keeps the first and every n-th token by hooks on attentions, as kvpress's own do."""

    def __init__(self, compression_ratio):
        self.every = round(1 / (1 - compression_ratio))

    def hook(self, module, args, kwargs, output):
        if kwargs["cache_position"][-1] + 1 == kwargs["hidden_states"].shape[1]:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            layer.keys, layer.values = layer.keys[:, :, :: self.every], layer.values[:, :, :: self.every]

    @contextmanager
    def __call__(self, model):
        hooks = [each.self_attn.register_forward_hook(self.hook, with_kwargs=True) for each in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()


class MaskingPress:
    """Masks the second token of the first head once the prompt is read, as kvpress does for single heads."""

    def __init__(self, compression_ratio):
        self.places = (torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))

    @contextmanager
    def __call__(self, model):
        yield
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = self.places


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("presses", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["presses"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded():
    return load_model("builtin:tiny", dtype="float32")


@pytest.fixture
def kvpress(monkeypatch):
    found = {each.__name__: each for each in (EveryPress, MaskingPress)}
    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(**found))


def read(model, cache, ids, **options):
    return model(input_ids=ids, past_key_values=cache, **options).logits[0]


@pytest.mark.usefixtures("kvpress")
@torch.inference_mode()
def test_dropped_tokens_are_masked_and_later_ones_keep_their_places(script, loaded):
    ids = torch.randint(loaded.vocabulary, (1, PROMPT + LATER), generator=torch.Generator().manual_seed(0))
    prompt, later = ids[:, :PROMPT], ids[:, PROMPT:]
    pressed, whole = script.Pressed("Every", 0.25).cache(loaded.config), DynamicCache(config=loaded.config)
    with script.driven(loaded.model):
        read(loaded.model, pressed, prompt)
        assert (pressed.layers[0].keys.shape[2], pressed.get_seq_length()) == (PROMPT // 4, PROMPT)
        found = torch.cat([read(loaded.model, pressed, part) for part in later.split(4, dim=1)])
        read(loaded.model, whole, prompt)
    seen = torch.ones(LATER, PROMPT + LATER, dtype=torch.bool).tril(PROMPT)
    seen[:, :PROMPT] &= torch.arange(PROMPT) % 4 == 0
    expected = read(loaded.model, whole, later, attention_mask=seen[None, None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in loaded.model.modules())


@pytest.mark.usefixtures("kvpress")
@torch.inference_mode()
def test_masks_of_single_heads_are_of_their_cache_alone(script, loaded):
    ids = torch.arange(PROMPT)[None]
    pressed, whole = script.Pressed("Masking", 0.5).cache(loaded.config), DynamicCache(config=loaded.config)
    attention = loaded.model.model.layers[3].self_attn
    with script.driven(loaded.model):
        read(loaded.model, pressed, ids)
        read(loaded.model, whole, ids)
        assert attention.masked_key_indices is None
        read(loaded.model, pressed, ids[:, :1])
        assert [each.tolist() for each in attention.masked_key_indices] == [[0], [0], [1]]
    attention.masked_key_indices = None


@pytest.mark.usefixtures("kvpress")
@torch.inference_mode()
def test_a_press_keeps_the_bytes_of_its_plan(script, loaded):
    plan = Plan.uniform(loaded.info, 4, 4)
    groups = script.of_equal_bytes({"four": plan}, 1024)
    assert [each.name for each in groups["four"]] == ["four", *(f"{kind}, as four" for kind in script.PRESSES)]
    kept = groups["four"][1].baseline.kept
    tokens = DynamicCache(config=loaded.config)
    read(loaded.model, tokens, torch.arange(int(1024 * kept))[None])
    lacking = plan.cache_bytes(1024).total - cache_nbytes(tokens) / 2  # in float32 here
    assert 0 <= lacking < plan.unquantized_bytes(1)
