"""Prompts with images: token ids in which each image is so many tokens, and the tensors that the model reads there."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import TextError, first_sentence
from ..files import is_device
from .chat import TEMPLATE_FAILURES

NOT_INPUTS = frozenset({"input_ids", "attention_mask"})
"""Outputs of a processor that are no inputs beside the ids: a single prompt has no padding."""


class ImagePrompt(NamedTuple):
    """A prompt with images.

    Attributes:
        ids: the token ids; each image is as many of them as the model reads it as.
        inputs: pixels, and whatever else the model takes beside the ids, by name.
    """

    ids: list[int]
    inputs: dict[str, Tensor]


def read_images(paths: Sequence[Path]) -> list[Any]:
    """Return images as Pillow has them, in colour. Raises TextError for a file that is no image, or without Pillow."""
    if importlib.util.find_spec("PIL") is None:
        raise TextError("--image reads images with Pillow: pip install 'kvmix[images]'")
    return [_read(path) for path in paths]


def image_prompt(processor: Any, text: str, images: Sequence[Any], model_id: str) -> ImagePrompt:
    """Return a user's turn of images, and then text, in the model's chat template, up to where the answer begins.

    Without a template the images come first, and then the text as it is.

    Raises:
        TextError: if the template or the processor fails, or leaves out images or any of the text.
    """
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    turn = [{"role": "user", "content": content}]
    has_template = bool(getattr(processor, "chat_template", None))
    try:
        if has_template:
            written = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        else:
            written = str(processor.image_token) * len(images) + text
        found = processor(text=[written], images=list(images), return_tensors="pt", add_special_tokens=not has_template)
        ids: list[int] = found["input_ids"][0].tolist()
    except (*TEMPLATE_FAILURES, OSError, ImportError) as error:
        raise TextError(f"the processor of {model_id} does not take this prompt: {first_sentence(error)}") from error
    if text.strip() not in written:
        raise TextError(f"the chat template of {model_id} leaves out part of what the user says: correct it")
    inputs = {name: value for name, value in found.items() if name not in NOT_INPUTS and isinstance(value, Tensor)}
    if not any("pixel" in name or "image" in name for name in inputs):
        raise TextError(f"the processor of {model_id} leaves out the images: it gives only {', '.join(found)}")
    return ImagePrompt(ids, inputs)


def _read(path: Path) -> Any:
    from PIL import Image

    try:
        if is_device(path):
            raise TextError(f"cannot read the image {path}: it is a device, not a file")
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, ArithmeticError, LookupError, Image.DecompressionBombError) as error:
        system = getattr(error, "strerror", None)
        reason = system or f"it is no image that Pillow reads ({first_sentence(error)})"
        raise TextError(f"cannot read the image {path}: {reason}; give a PNG or JPEG file") from error
