"""The built-in model with a chat template, so that it is asked as an instruction model is."""

import copy
import dataclasses

from evaluating import tiny

TEMPLATE = "{% for m in messages %}<user>{{ m.content | trim }}</user>{% endfor %}<model>"


def chatty(template=TEMPLATE):
    """Its tokenizer is a copy: others share the one that `tiny()` has."""
    tokenizer = copy.deepcopy(tiny().tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(tiny(), tokenizer=tokenizer)
