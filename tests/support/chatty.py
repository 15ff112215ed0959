"""The built-in model with other tokenizers: one with a chat template, and one that ends every text."""

import copy
import dataclasses

from evaluating import tiny
from tokenizers.processors import TemplateProcessing

TEMPLATE = "{% for m in messages %}<user>{{ m.content | trim }}</user>{% endfor %}<model>"


def chatty(template=TEMPLATE, loaded=None):
    """The built-in model, or some of its layers, with a copy of its tokenizer: others share the one that it has."""
    loaded = loaded or tiny()
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(loaded, tokenizer=tokenizer)


def ends_texts(loaded):
    """The model with a tokenizer that puts its end token after every text."""
    tokenizer = copy.deepcopy(loaded.tokenizer)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return dataclasses.replace(loaded, tokenizer=tokenizer)


LOSES_TEXT = (
    "{% for m in messages %}{% for part in m.content if part.text %}{{ part.text }}{% endfor %}{% endfor %}<model>"
)
"""A template that expects parts of content, and leaves out a text."""
