"""lm-eval's requests as token ids: the tokens that are prefilled, those fed through the cache, and those scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from ....errors import EvaluationError, did_you_mean
from ...base import Sample

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

GENERATE = "generate_until"
SCORE = "loglikelihood"
ROLL = "loglikelihood_rolling"
KINDS = (GENERATE, SCORE, ROLL)
PREFILL_UNIT = 16
"""A prompt is prefilled up to a multiple of this many tokens; the rest is fed one by one, as answers are."""
SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "renormalize_logits",
)
"""Settings of transformers' `generate` that a task may choose; the cache and the number of sequences are ours."""
WITHOUT_EFFECT = ("max_length", "use_cache", "early_stopping", "length_penalty")
"""Settings that some tasks have and that change no answer here: without beams, and with a cache of our own."""


class PromptEncoder(Protocol):
    """Text to token ids as lm-eval does it, and the limits of the model. `KvmixLM` is one.

    Attributes:
        step: tokens that are fed at a time where a continuation is scored.
        max_gen_toks: most tokens of an answer where a task does not say it.
        end_of_text: the text that ends every answer.
    """

    step: int

    @property
    def max_length(self) -> int: ...

    @property
    def max_gen_toks(self) -> int: ...

    @property
    def end_of_text(self) -> str: ...

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt."""
        ...

    def encode_pairs(self, kind: str, instance: Instance) -> list[tuple[list[int], list[int]]]:
        """Return the token ids of context and continuation for each pass that a request takes."""
        ...


@dataclass(frozen=True)
class TokenRequest(Sample):
    """One pass through a fresh cache: a request of lm-eval, or a window of one about a long text.

    Requests with the same `prefill` share a batch without padding before any of them.

    Attributes:
        ids: the prompt; or a context and its continuation, of which the very last token is only ever predicted.
        kind: lm-eval's name for it, one of `KINDS`.
        owner: index of the lm-eval request of this kind that it answers; a long text takes several passes.
        task, document: name and index of what that request is about.
        prefill: tokens that enter the cache at once. At least the last one of a context does not.
        scored: tokens at the end whose log-likelihood is summed.
        generation: settings of `generate`, with `until` and `max_gen_toks`, as JSON.
        cut: tokens that were cut off on the left.
    """

    kind: str
    owner: int
    task: str
    document: int
    prefill: int
    scored: int = 0
    generation: str = ""
    cut: int = 0

    @property
    def batch(self) -> tuple[str, str, int]:
        """Return the key that requests of one batch have in common."""
        return self.kind, self.generation, self.prefill


def encode_requests(encoder: PromptEncoder, kind: str, instances: Sequence[Instance]) -> list[TokenRequest]:
    """Return the passes that requests of one kind take, in an order that batches well: the longest first.

    Raises:
        EvaluationError: if a request cannot be answered at all.
    """
    passes = _prompts if kind == GENERATE else _continuations
    found = [each for owner, instance in enumerate(instances) for each in passes(encoder, kind, owner, instance)]
    return sorted(found, key=lambda each: (each.generation, -each.prefill, each.ids[: each.prefill], -len(each.ids)))


def merge_replies(kind: str, count: int, answered: Iterable[tuple[TokenRequest, Any]]) -> list[Any]:
    """Return the reply to each of `count` requests: a text; a log-likelihood and a bool; or a log-likelihood.

    Args:
        answered: passes, in any order, and the value of each: a text, or a log-likelihood and a bool.
    """
    parts: list[list[Any]] = [[] for _ in range(count)]
    for request, value in answered:
        parts[request.owner].append(value)
    if kind == GENERATE:
        return [values[0] for values in parts]
    sums = [(sum(value for value, _ in values), all(greedy for _, greedy in values)) for values in parts]
    return sums if kind == SCORE else [value for value, _ in sums]


def _prompts(encoder: PromptEncoder, kind: str, owner: int, instance: Instance) -> Iterator[TokenRequest]:
    context, given = instance.args[:2]
    name = _name(instance)
    settings = _generation(encoder, name, given)
    room = encoder.max_length - settings["max_gen_toks"]
    if room < 1:
        raise EvaluationError(
            f"{name} asks for up to {settings['max_gen_toks']} new tokens, which leaves no room for a prompt in "
            f"{encoder.max_length}; use a larger --max-length"
        )
    ids, generation = encoder.encode_prompt(context), json.dumps(settings, sort_keys=True)
    yield _request(name, kind, owner, instance, ids, room, PREFILL_UNIT, generation=generation)


def _continuations(encoder: PromptEncoder, kind: str, owner: int, instance: Instance) -> Iterator[TokenRequest]:
    for number, (context, continuation) in enumerate(encoder.encode_pairs(kind, instance)):
        name = f"{_name(instance)}/{number}" if kind == ROLL else _name(instance)
        if not 1 <= len(continuation) <= encoder.max_length:
            raise EvaluationError(
                f"{name}: a continuation of {len(continuation)} tokens cannot be scored; "
                f"it takes between 1 and {encoder.max_length}, see --max-length"
            )
        ids, most = [*context, *continuation], encoder.max_length + 1
        yield _request(name, kind, owner, instance, ids, most, encoder.step, scored=len(continuation))


def _request(
    name: str,
    kind: str,
    owner: int,
    instance: Instance,
    ids: Sequence[int],
    most: int,
    unit: int,
    *,
    scored: int = 0,
    generation: str = "",
) -> TokenRequest:
    """Return the pass over the last `most` tokens, prefilled in whole units; what is scored is never prefilled."""
    kept = tuple(ids[-most:])
    return TokenRequest(
        name=name,
        ids=kept,
        kind=kind,
        owner=owner,
        task=str(instance.task_name),
        document=int(instance.doc_id or 0),
        prefill=(len(kept) - scored - 1) // unit * unit,
        scored=scored,
        generation=generation,
        cut=len(ids) - len(kept),
    )


def _generation(encoder: PromptEncoder, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return a request's settings as HFLM reads them: greedy unless a temperature or sampling is chosen."""
    settings: dict[str, Any] = dict(normalize_gen_kwargs(given, encoder.max_gen_toks))
    until = handle_stop_sequences(settings.pop("until", None), eos=encoder.end_of_text)
    if settings.get("temperature", 0.0) == 0.0 and not settings["do_sample"]:
        settings.pop("temperature", None)
    for alone in ("num_beams", "num_return_sequences"):
        if settings.pop(alone, 1) != 1:
            raise EvaluationError(f"{name} wants {alone} {given[alone]}: answers are one token sequence each here")
    if settings.get("temperature") == 0.0:
        raise EvaluationError(f"{name} samples at temperature 0; use a temperature above 0, or do_sample: false")
    kept = {key: value for key, value in settings.items() if key not in WITHOUT_EFFECT}
    known = ("until", "max_gen_toks", *SAMPLING)
    if unknown := [key for key in kept if key not in known]:
        raise EvaluationError(
            f"{name} has the generation setting '{unknown[0]}'{did_you_mean(unknown[0], known)}; "
            f"generation_kwargs may have {', '.join(known)}"
        )
    return {**kept, "until": [stop for stop in until if stop]}


def _name(instance: Instance) -> str:
    return f"{instance.task_name}/{instance.doc_id}/{instance.idx}"
