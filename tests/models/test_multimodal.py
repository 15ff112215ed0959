"""Models that read images: text goes through them as through any other, and `run --image` gives them pictures."""

import importlib.util
import json
import warnings
from pathlib import Path

import multimodal
import pytest
import torch
import transformers
from commandline import kvmix, kvmix_json, refused
from kvmix_kernels.sorted_tokens import EVICTED
from PIL import Image
from transformers.cache_utils import DynamicCache

from kvmix_cli.cache.mixed import MixedCache
from kvmix_cli.cache.subject import Subject
from kvmix_cli.decoding.feed import document_loss
from kvmix_cli.decoding.generate import generate
from kvmix_cli.errors import ModelError, TextError
from kvmix_cli.models import multimodal as loading
from kvmix_cli.models.attention import set_attention
from kvmix_cli.models.loading import load_model
from kvmix_cli.plan import CacheSettings, Plan
from kvmix_cli.plan.layers import LayerPlan, TensorPlan
from kvmix_cli.plan.tokens import TokenPolicy
from kvmix_cli.plan.windows import Recent
from kvmix_cli.profiling.run import run_profile
from kvmix_cli.texts.images import image_prompt, read_images

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40


@pytest.fixture(scope="module", params=multimodal.NAMES)
def folder(request, tmp_path_factory):
    return multimodal.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def processor(folder, monkeypatch):
    """Processors that need no torchvision, in the place of those that do."""
    name = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    if name != "gemma3":
        made = multimodal.processor_of(name, multimodal.tokenizer_of(name))
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *args, **options: made)


@pytest.fixture
def picture(tmp_path):
    return multimodal.picture(tmp_path / "picture.png")


def quantized(info, bits=4):
    cache = CacheSettings(page=16, sink=2, window=Recent(tokens=8), group_size=16)
    layer = LayerPlan(k=TensorPlan(bits=bits), v=TensorPlan(bits=bits))
    return Subject("plan", Plan.build(info, dict.fromkeys(info.quantizable, layer), cache))


def test_a_text_is_read_at_its_own_positions_after_an_image_was_answered(folder):
    """Models with positions in three dimensions keep how much the last image shifted them, for each row."""
    loaded = load_model(folder)
    ids = list(range(100, 148))
    expected = document_loss(loaded, DynamicCache(config=loaded.config), ids, 32, 4)
    for module in loaded.model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = torch.tensor([[-9], [-9]])
    found = document_loss(loaded, DynamicCache(config=loaded.config), ids, 32, 4)
    assert found == pytest.approx(expected, rel=1e-6), "the same products in the same order"


def test_text_is_profiled_and_read_back(folder):
    loaded = load_model(folder)
    profile = run_profile(loaded, ["grad-norm", "error"], texts=[TEXT], source="text", samples=1, seq_len=320)
    assert list(profile.scores["grad-norm"].layers) == loaded.info.quantizable
    assert all(layer.k.mean > 0 and layer.v.mean > 0 for layer in profile.scores["grad-norm"].layers.values())
    ids = loaded.tokenizer(TEXT).input_ids[:200]
    own = document_loss(loaded, DynamicCache(config=loaded.config), ids, prefix=64, step=16)
    cache = quantized(loaded.info, 8).cache(loaded.config, reserve=0)
    assert document_loss(loaded, cache, ids, prefix=64, step=16) == pytest.approx(own, rel=0.05), "8 bits are close"
    assert cache.attended.quantized > 0


def test_pictures_are_read_as_the_model_itself_reads_them(folder, processor, picture, tmp_path):
    """Without quantization: the same tokens as transformers' own generation, and other ones for another picture."""
    loaded = load_model(folder, reads_images=True)
    pictures = read_images([picture, multimodal.picture(tmp_path / "other.png", seed=1)])
    prompt = image_prompt(loaded.processor, "What is this?", pictures, "m")
    assert len(prompt.ids) > 10, "pictures are tokens"
    found = generate(
        loaded, prompt.ids, Subject().cache(loaded.config, reserve=0), max_new_tokens=8, inputs=prompt.inputs
    )
    set_attention(loaded.model, "sdpa")
    ids = torch.tensor([prompt.ids])
    whole = loaded.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **prompt.inputs
    )
    assert found.text == loaded.tokenizer.decode(whole[0, len(prompt.ids) :], skip_special_tokens=True)
    assert found.prompt_tokens == len(prompt.ids)
    inputs = {**prompt.inputs, "pixel_values": torch.zeros_like(prompt.inputs["pixel_values"])}
    logits = [loaded.model(input_ids=ids, **each).logits[0, -1] for each in (prompt.inputs, inputs)]
    assert not torch.allclose(*logits), "the picture counts"


def test_tokens_of_pictures_are_the_first_to_be_dropped(folder, processor, tmp_path):
    """`run` tells a cache which tokens of the prompt are of a picture, in every model that reads some."""
    loaded = load_model(folder, reads_images=True)
    pictures = read_images([multimodal.picture(tmp_path / f"{seed}.png", seed=seed) for seed in range(3)])
    prompt = image_prompt(loaded.processor, TEXT[:700], pictures, "m")
    policy = TokenPolicy(score="attention", evict=0.5, images="last", flush=64)
    settings = CacheSettings(page=16, sink=0, window=Recent(tokens=8), group_size=16, tokens=policy)
    layer = LayerPlan(k=TensorPlan(bits=4), v=TensorPlan(bits=4))
    plan = Plan.build(loaded.info, dict.fromkeys(loaded.info.quantizable, layer), settings)
    cache = MixedCache.from_plan(plan, loaded.config)
    generate(loaded, prompt.ids, cache, max_new_tokens=3, inputs=prompt.inputs)
    tiers = cache.layers[loaded.info.quantizable[0]].stores[0].packing.view.tier[0]
    is_image = torch.isin(torch.tensor(prompt.ids), torch.tensor(loading.image_tokens(loaded.config)))
    assert 12 <= is_image.sum() <= tiers.shape[1] // 2
    assert (tiers[:, is_image[: tiers.shape[1]]] == EVICTED).all()
    assert (tiers == EVICTED).sum(1).tolist() == [tiers.shape[1] // 2] * 2


def test_a_model_of_text_has_no_tokens_of_images():
    assert loading.image_tokens(transformers.LlamaConfig()) == []


@pytest.mark.slow
def test_a_cache_that_quantizes_reads_pictures(folder, processor, picture, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = ("run", folder, "--uniform", 4, "--image", picture, "--prompt", TEXT[:600], "--max-new-tokens", 4)
    found = kvmix_json(*command, "--image", picture)
    once = kvmix_json(*command)
    assert found["prompt_tokens"] > once["prompt_tokens"], "each picture is tokens"
    assert found["new_tokens"] == 4


def test_of_a_model_that_speaks_the_part_that_reads_and_writes_is_loaded():
    for name in ("Qwen2_5OmniConfig", "Qwen3OmniMoeConfig"):
        config = getattr(transformers, name)()
        part = loading.without_speech(config)
        assert part is config.thinker_config
        assert type(part) in loading.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    config = transformers.LlamaConfig()
    assert loading.without_speech(config) is config


def test_a_class_for_text_that_does_not_find_its_weights_in_the_whole_is_not_taken():
    assert loading.find_loader(transformers.Emu3Config()) is transformers.AutoModelForImageTextToText
    assert loading.find_loader(transformers.Gemma3Config()) is transformers.AutoModelForCausalLM


def test_an_encoder_of_images_keeps_its_attention(folder, processor):
    config = load_model(folder, reads_images=True).config
    assert config.get_text_config()._attn_implementation == "kvmix"
    assert config.vision_config._attn_implementation == "sdpa"


class TestRefused:
    def test_a_model_of_text_alone(self, picture):
        error = refused(kvmix("run", "builtin:tiny", "--baseline", "--prompt", "a", "--image", picture))
        assert error.startswith("builtin:tiny reads text only (llama): leave out --image")

    @pytest.mark.parametrize("content", [b"", b"no picture", None])
    def test_a_file_that_is_no_picture(self, tmp_path, content):
        path = tmp_path / "picture.png"
        if content is not None:
            path.write_bytes(content)
        error = refused(kvmix("run", "builtin:tiny", "--baseline", "--prompt", "a", "--image", path))
        assert f"cannot read the image {path}: " in error
        assert ("No such file" if content is None else "no image that Pillow reads") in error

    def test_a_device(self):
        error = refused(kvmix("run", "builtin:tiny", "--baseline", "--prompt", "a", "--image", "/dev/zero"))
        assert "it is a device" in error

    def test_a_picture_that_is_cut_off(self, picture):
        picture.write_bytes(picture.read_bytes()[:2000])
        with pytest.raises(TextError, match="cannot read the image"):
            read_images([picture])

    def test_a_picture_that_would_fill_the_memory(self, picture, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        with warnings.catch_warnings(), pytest.raises(TextError, match="cannot read the image"):
            warnings.simplefilter("ignore")
            read_images([picture])

    def test_without_pillow(self, monkeypatch, picture):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(TextError, match=r"with Pillow: pip install 'kvmix\[images\]'"):
            read_images([picture])

    def test_without_a_processor(self, tmp_path):
        folder = Path(multimodal.save("gemma3", tmp_path / "m"))
        for file in folder.glob("*processor*"):
            file.unlink()
        with pytest.raises(ModelError, match=r"has no processor that can be loaded .*needs its preprocessor_config"):
            load_model(str(folder), reads_images=True)

    def test_without_torchvision(self, monkeypatch):
        def from_pretrained(*args, **options):
            raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", from_pretrained)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        config = multimodal.config_of("qwen2_5_vl", multimodal.tokenizer_of("qwen2_5_vl"))
        with pytest.raises(ModelError, match=r"needs torchvision: pip install 'kvmix\[images\]'"):
            loading.load_processor("m", "m", config)

    def test_a_template_without_pictures(self, picture):
        tokenizer = multimodal.tokenizer_of("gemma3")
        processor = multimodal.processor_of("gemma3", tokenizer)
        processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
        with pytest.raises(TextError, match="does not take this prompt"):
            image_prompt(processor, "What is this?", read_images([picture]), "m")
        processor.chat_template = "<start_of_image>"
        with pytest.raises(TextError, match="leaves out part of what the user says"):
            image_prompt(processor, "What is this?", read_images([picture]), "m")


def test_without_a_template_pictures_come_first(picture):
    processor = multimodal.processor_of("gemma3", multimodal.tokenizer_of("gemma3"))
    processor.chat_template = None
    prompt = image_prompt(processor, "What is this?", read_images([picture]), "m")
    assert processor.tokenizer.image_token_id in prompt.ids
