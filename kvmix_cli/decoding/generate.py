"""Generation from one prompt, streamed and timed: what `kvmix run` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import TextStreamer

from ..cache.mixed import MixedCache
from ..errors import KvmixError, is_out_of_memory
from ..models.multimodal import image_tokens
from .feed import fill
from .prompt_scores import scores_prompts
from .sampling import Sampling
from .settings import continue_tokens, greedy_settings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedTokenizerBase

    from ..models.loading import LoadedModel


@dataclass(frozen=True)
class Generation:
    """One answer and what it took. Prompt and decode are timed apart: the first token ends the prompt.

    Attributes:
        text: of the answer, without special tokens.
        max_new_tokens: the most that were allowed; less than was asked for if the model's limit is near.
        reused_tokens: tokens of the prompt that were in the cache at the start.
        prompt_seconds: from the start until the first token was there.
        decode_seconds: from the first token until the last.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    max_new_tokens: int
    prompt_seconds: float
    decode_seconds: float
    reused_tokens: int = 0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Return tokens of the prompt that were fed in a second."""
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_seconds

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Return tokens a second after the first one, None if there was no second one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


class _TimedStreamer(TextStreamer):  # type: ignore[misc, unused-ignore]
    """A streamer that hands on text as it forms and keeps the time of each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.text = ""
        self.times: list[float] = []
        """When the prompt was handed over, and then when each token came."""

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.text += text
            self._on_text(text)


def generate(
    loaded: LoadedModel,
    prompt_ids: Sequence[int],
    cache: Cache,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
    inputs: Mapping[str, Tensor] | None = None,
    on_prompt: Callable[[], None] | None = None,
) -> Generation:
    """Continue one prompt through a cache, an empty one or one that holds the first tokens of the prompt.

    Args:
        prompt_ids: the prompt's tokens, special ones included.
        max_new_tokens: cut to what the model's limit leaves; `Generation.max_new_tokens` says to what.
        temperature: 0 is greedy.
        top_p: share of the probability to sample from, in (0, 1].
        on_text: called with each piece of text as soon as it is final.
        inputs: what the model reads beside the ids, such as the pixels of images; such prompts are fed at once.
        on_prompt: called when the cache holds all of the prompt but its last token, which is then fed by itself.

    Raises:
        KvmixError: if the prompt is empty or leaves no room for an answer, a setting is out of its range, or memory
            runs out.
    """
    if max_new_tokens < 1:
        raise KvmixError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    sampling = Sampling(temperature, top_p).settings
    loaded.check_ids([prompt_ids])
    allowed = min(max_new_tokens, room(len(prompt_ids), loaded.max_length))
    settings = greedy_settings(loaded, allowed, **sampling)
    streamer = _TimedStreamer(loaded.tokenizer, on_text)
    if sampling:
        torch.manual_seed(seed)
    try:
        ids, reused = torch.tensor([list(prompt_ids)], device=loaded.device), cache.get_seq_length()
        _label_images(loaded, ids[:, reused:], cache)
        filling = _fill(loaded, ids, cache, on_prompt)
        continue_tokens(loaded, ids, cache, settings, streamer=streamer, inputs=inputs)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise KvmixError(
            f"out of memory on {loaded.device} after a prompt of {len(prompt_ids)} tokens and "
            f"{max(len(streamer.times) - 1, 0)} new ones; "
            "use a shorter prompt, a smaller --prefill-chunk or --max-new-tokens, or fewer bits"
        ) from error
    start, first, *_, last = (*streamer.times, streamer.times[-1])
    return Generation(
        text=streamer.text,
        prompt_tokens=len(prompt_ids),
        new_tokens=len(streamer.times) - 1,
        max_new_tokens=allowed,
        prompt_seconds=filling + first - start,
        decode_seconds=last - first,
        reused_tokens=reused,
    )


def _label_images(loaded: LoadedModel, ids: Tensor, cache: Cache) -> None:
    """Tell a cache which tokens of a prompt `[1, T]` are of an image, if its plan may ask."""
    if isinstance(cache, MixedCache) and (tokens := image_tokens(loaded.config)):
        cache.label(torch.isin(ids, torch.tensor(tokens, device=ids.device)))


@torch.inference_mode()
def _fill(loaded: LoadedModel, ids: Tensor, cache: Cache, on_prompt: Callable[[], None] | None) -> float:
    """Feed the tokens of a prompt `[1, T]` that are not left to `generate`, and return the seconds that this took."""
    start, held, tokens = time.perf_counter(), cache.get_seq_length(), ids.shape[1]
    size = loaded.prefill_chunk or tokens
    is_whole = on_prompt is not None or scores_prompts(cache)
    stop = tokens - 1 if is_whole else tokens - 1 - (tokens - 1 - held) % size
    if stop > held:
        fill(loaded, cache, ids[:, held:stop])
    seconds = time.perf_counter() - start
    if on_prompt is not None:
        on_prompt()
    return seconds


def room(prompt_tokens: int, limit: int | None) -> int:
    """Return how many new tokens a prompt leaves room for. Raises KvmixError if there is no prompt or no room."""
    if prompt_tokens < 1:
        raise KvmixError("the prompt is empty; give some text with --prompt or --prompt-file")
    if limit is None:
        return 2**31
    if prompt_tokens >= limit:
        raise KvmixError(
            f"the prompt has {prompt_tokens} tokens and the model's limit, answer included, is {limit}; shorten it"
        )
    return limit - prompt_tokens
