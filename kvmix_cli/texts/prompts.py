"""Prompts of users: read from a file or stdin, and checked before any work is done on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import TextError
from ..files import is_device
from .files import decoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIB = 2**20
MAX_BYTES = 64 * MIB
"""Bytes of a prompt that are read at all; the model's context is the limit once the model is loaded."""
STDIN = "-"


def read_prompt(name: str) -> str:
    """Return the text of a file, or of stdin for `-`, without a byte-order mark.

    Raises:
        TextError: if it is empty, too long, a device or no UTF-8 text, or cannot be read.
    """
    label = "stdin" if name == STDIN else name
    try:
        if name == STDIN:
            data = b"" if sys.stdin is None else _read_at_most(sys.stdin.buffer, label)
        else:
            if is_device(Path(name)):
                raise TextError(f"cannot read the prompt from {name}: it is a device, not a file")
            with Path(name).open("rb") as file:
                data = _read_at_most(file, label)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TextError(f"cannot read the prompt from {name}: {reason}") from error
    return decoded(data, label)


def check_not_empty(text: str) -> str:
    """Return a prompt. Raises TextError if it has no words."""
    if not text.strip():
        raise TextError("the prompt is empty; give some text with --prompt or --prompt-file")
    return text


def check_length(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None) -> None:
    """Raise TextError for a text that the model cannot hold, whatever its tokens are.

    Args:
        max_length: tokens that the model takes; None if it sets no limit.
    """
    if max_length is None:
        return
    longest = max(map(len, tokenizer.get_vocab()))
    if len(text) > max_length * longest:
        raise TextError(
            f"the prompt has {len(text)} characters; the model's limit of {max_length} tokens holds at most "
            f"{max_length * longest}: shorten it"
        )


def _read_at_most(file: BinaryIO, name: str) -> bytes:
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise TextError(f"the prompt in {name} has more than {MAX_BYTES // MIB} MiB; shorten it")
    return data
