"""Small models that read images, with processors made here: Qwen2.5-VL, Gemma 3, Llama 4."""

import shutil

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import BatchFeature
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from kvmix_cli.models.sources import ASSETS

VOCABULARY = 4160
"""That of builtin:tiny's tokenizer, and room for the tokens of images."""
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE_TOKENS = {
    "qwen2_5_vl": ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"],
    "gemma3": ["<start_of_image>", "<image_soft_token>", "<end_of_image>"],
    "llama4": ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"],
}
_PLACES = {"qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<start_of_image>"}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}PLACE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
NAMES = list(IMAGE_TOKENS)


def tokenizer_of(name):
    """builtin:tiny's tokenizer with the tokens of images."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": IMAGE_TOKENS[name]})
    if name == "gemma3":
        named = dict(zip(("boi_token", "image_token", "eoi_token"), IMAGE_TOKENS[name], strict=True))
        tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "tiny", extra_special_tokens=named)
    return tokenizer


def config_of(name, tokenizer):
    ids = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[name])
    if name == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 64}
        return transformers.Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": rope},
            vision_config={**vision, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
            vision_start_token_id=ids[0],
            image_token_id=ids[1],
            video_token_id=ids[2],
            vision_end_token_id=ids[3],
        )
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * 2
        return transformers.Gemma3Config(
            text_config={**_TEXT, "head_dim": 16, "sliding_window": 64, "layer_types": kinds},
            vision_config={**_VISION, "image_size": 56, "patch_size": 14},
            mm_tokens_per_image=4,
            boi_token_index=ids[0],
            image_token_index=ids[1],
            eoi_token_index=ids[2],
        )
    vision = {"image_size": 56, "patch_size": 14, "pixel_shuffle_ratio": 0.5, "vision_output_dim": 48}
    projector = {"projector_input_dim": 48, "projector_output_dim": 48, "intermediate_size": 128}
    return transformers.Llama4Config(
        text_config={**_TEXT, "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 2},
        vision_config={**_VISION, **vision, **projector},
        image_token_index=ids[3],
        boi_token_index=ids[1],
        eoi_token_index=ids[2],
    )


class TiledProcessor:
    """Llama 4's images without torchvision, which its own processor needs: one tile, 4 patches an image."""

    image_processor = None
    image_token = "<|image|>"
    chat_template = TEMPLATE.replace("PLACE", image_token)

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def apply_chat_template(self, turn, **options):
        return self.tokenizer.apply_chat_template(turn, chat_template=self.chat_template, **options)

    def __call__(self, text, images, return_tensors, add_special_tokens):
        written = text[0].replace(self.image_token, "<|image_start|><|image|>" + "<|patch|>" * 4 + "<|image_end|>")
        pixels = [np.asarray(image.resize((56, 56)), dtype="float32").transpose(2, 0, 1) / 255 for image in images]
        ids = self.tokenizer(written, return_tensors="pt", add_special_tokens=add_special_tokens)
        return BatchFeature({**ids, "pixel_values": torch.tensor(np.stack(pixels))})


def processor_of(name, tokenizer):
    if name == "llama4":
        return TiledProcessor(tokenizer)
    template = TEMPLATE.replace("PLACE", _PLACES[name])
    if name == "gemma3":
        images = Gemma3ImageProcessorPil(size={"height": 56, "width": 56})
        return transformers.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    return QwenProcessor(images, tokenizer, template)


class QwenProcessor:
    """Qwen2.5-VL's images without torchvision, which its processor needs for videos."""

    image_token = "<|image_pad|>"

    def __init__(self, image_processor, tokenizer, chat_template):
        self.image_processor, self.tokenizer, self.chat_template = image_processor, tokenizer, chat_template

    def apply_chat_template(self, turn, **options):
        return self.tokenizer.apply_chat_template(turn, chat_template=self.chat_template, **options)

    def __call__(self, text, images, return_tensors, add_special_tokens):
        found = self.image_processor(images=images, return_tensors="pt")
        parts = text[0].split(self.image_token)
        counts = found["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2
        written = "".join(part + self.image_token * int(count) for part, count in zip(parts, [*counts, 0], strict=True))
        ids = self.tokenizer(written, return_tensors="pt", add_special_tokens=add_special_tokens)
        kinds = (ids.input_ids == self.tokenizer.convert_tokens_to_ids(self.image_token)).int()
        return BatchFeature({**ids, **found, "mm_token_type_ids": kinds})


def save(name, folder):
    """A folder of the model with its tokenizer; of Gemma 3 also with its processor."""
    tokenizer = tokenizer_of(name)
    torch.manual_seed(0)
    loader = transformers.AutoModelForImageTextToText
    model = loader.from_config(config_of(name, tokenizer), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    for file in (ASSETS / "tiny").glob("tokenizer*"):
        shutil.copy(file, folder)
    tokenizer.save_pretrained(folder)
    if name == "gemma3":
        processor_of(name, tokenizer).save_pretrained(folder)
    return str(folder)


def picture(path, seed=0):
    """A PNG of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
