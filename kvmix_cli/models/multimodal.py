"""Models that read images or sound as well as text: the class that loads them, and the processor of their images.

Text alone goes through such a model as through any other. `AutoModelForCausalLM` knows some of them, of a few only
their text part; all are known to `AutoModelForMultimodalLM`. Of a model that speaks, too (Qwen2.5-Omni, Qwen3-Omni),
the part that reads and writes is loaded alone.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from transformers import AutoProcessor, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from ..errors import ModelError, first_sentence

CLASSES = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
}
"""Loaders of transformers, in the order in which they are tried, each with the configurations that it knows."""
WHOLE = frozenset({"emu3"})
"""Model types whose class for the text part does not find its weights in a checkpoint of the whole."""
IMAGE_PACKAGE = "torchvision"
"""The package that many processors of images need, beside Pillow."""


def without_speech(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the part that reads and writes, of a model that speaks; of others their own."""
    part = getattr(config, "thinker_config", None)
    return part if isinstance(part, PreTrainedConfig) else config


def image_tokens(config: PreTrainedConfig) -> list[int]:
    """Return the ids that stand for parts of an image or a video in a prompt; none of a model that reads text only."""
    names = (f"{of}_token_{kind}" for of in ("image", "video") for kind in ("id", "index"))
    return [token for name in names if isinstance(token := getattr(config, name, None), int)]


def find_loader(config: PreTrainedConfig, *, reads_images: bool = False) -> Any | None:
    """Return the class of transformers that loads a model of this configuration, None if there is none.

    Args:
        reads_images: take a class that reads images, not one for the text part alone.
    """
    own = getattr(config, "auto_map", None) or {}
    is_whole = reads_images or config.model_type in WHOLE
    for loader, known in CLASSES.items():
        if (type(config) in known or loader.__name__ in own) and not (is_whole and loader is AutoModelForCausalLM):
            return loader
    return None


def load_processor(source: str, model_id: str, config: PreTrainedConfig, **options: Any) -> Any:
    """Return the processor that makes a model's inputs of images and text.

    Raises:
        ModelError: if the model reads no images, it has no processor, or a package is missing.
    """
    own = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and AutoModelForImageTextToText.__name__ not in own:
        raise ModelError(
            f"{model_id} reads text only ({config.model_type}): leave out --image, or choose a model that reads images"
        )
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
    except (ImportError, OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        if IMAGE_PACKAGE in str(error).lower() and importlib.util.find_spec(IMAGE_PACKAGE) is None:
            raise ModelError(
                f"the processor of {model_id} needs {IMAGE_PACKAGE}: pip install 'kvmix[images]'"
            ) from error
        raise _no_processor(model_id, first_sentence(error)) from error
    if not hasattr(processor, "image_processor"):
        raise _no_processor(model_id, f"there is only a {type(processor).__name__}")
    return processor


def _no_processor(model_id: str, reason: str) -> ModelError:
    return ModelError(
        f"{model_id} has no processor that can be loaded ({reason}): --image needs its preprocessor_config.json or "
        "processor_config.json"
    )
