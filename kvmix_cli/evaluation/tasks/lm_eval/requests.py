"""What lm-eval asks, as tokens: what enters the cache at once, what is fed through it, and what of that is scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from ....errors import EvaluationError
from ...base import Sample

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from .model import KvmixLM

GENERATE = "generate_until"
SCORE = "loglikelihood"
ROLL = "loglikelihood_rolling"
KINDS = (GENERATE, SCORE, ROLL)
ALIGN = 16
"""A prompt is prefilled up to a multiple of this many tokens; the rest is fed one by one, as answers are."""


@dataclass(frozen=True)
class Request(Sample):
    """One pass through a fresh cache. Rows with the same `prefill` make a batch without any padding before them.

    Attributes:
        ids: the prompt; or a context and its continuation, of which the very last token is only ever predicted.
        kind: what lm-eval calls it.
        owner: the lm-eval request of this kind that it answers; a long text takes several passes.
        task, document: what that request is about.
        prefill: tokens that enter the cache at once. At least the last one of a context does not.
        scored: tokens at the end whose log-likelihood is asked for.
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
        """Requests that have this in common can share a batch."""
        return self.kind, self.generation, self.prefill


def encode(lm: KvmixLM, kind: str, instances: Sequence[Instance]) -> list[Request]:
    """The passes that requests of one kind take, in an order that batches well: the longest first.

    Args:
        lm: knows how lm-eval turns text into tokens, the longest context, and the step.

    Raises:
        EvaluationError: if a request cannot be answered at all.
    """
    passes = _prompts if kind == GENERATE else _continuations
    found = [each for owner, instance in enumerate(instances) for each in passes(lm, kind, owner, instance)]
    return sorted(found, key=lambda each: (each.generation, -each.prefill, each.ids[: each.prefill], -len(each.ids)))


def replies(kind: str, count: int, answered: Iterable[tuple[Request, Any]]) -> list[Any]:
    """What lm-eval is told on each of `count` requests: a text; a log-likelihood and a bool; or a log-likelihood."""
    parts: list[list[Any]] = [[] for _ in range(count)]
    for request, value in answered:
        parts[request.owner].append(value)
    if kind == GENERATE:
        return [values[0] for values in parts]
    sums = [(sum(value for value, _ in values), all(said for _, said in values)) for values in parts]
    return sums if kind == SCORE else [value for value, _ in sums]


def _prompts(lm: KvmixLM, kind: str, owner: int, instance: Instance) -> Iterator[Request]:
    context, given = instance.args[:2]
    name = _name(instance)
    settings = _generation(lm, name, given)
    room = lm.max_length - settings["max_gen_toks"]
    if room < 1:
        raise EvaluationError(
            f"{name} asks for up to {settings['max_gen_toks']} new tokens, which leaves no room for a prompt in "
            f"{lm.max_length}; use a larger --max-length"
        )
    ids = lm.encode_prompt(context)
    kept = ids[-room:]
    yield Request(
        name=name,
        ids=tuple(kept),
        kind=kind,
        owner=owner,
        task=str(instance.task_name),
        document=int(instance.doc_id or 0),
        prefill=_floor(len(kept) - 1, ALIGN),
        generation=json.dumps(settings, sort_keys=True),
        cut=len(ids) - len(kept),
    )


def _continuations(lm: KvmixLM, kind: str, owner: int, instance: Instance) -> Iterator[Request]:
    for number, (context, continuation) in enumerate(lm.encode_pairs(kind, instance)):
        name = f"{_name(instance)}/{number}" if kind == ROLL else _name(instance)
        if not 1 <= len(continuation) <= lm.max_length:
            raise EvaluationError(
                f"{name}: a continuation of {len(continuation)} tokens cannot be scored; "
                f"it takes between 1 and {lm.max_length}, see --max-length"
            )
        ids = [*context, *continuation]
        kept = ids[-(lm.max_length + 1) :]
        yield Request(
            name=name,
            ids=tuple(kept),
            kind=kind,
            owner=owner,
            task=str(instance.task_name),
            document=int(instance.doc_id or 0),
            prefill=_floor(len(kept) - len(continuation) - 1, lm.step),
            scored=len(continuation),
            cut=len(ids) - len(kept),
        )


def _generation(lm: KvmixLM, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Settings as HFLM reads them: greedy unless a temperature or sampling is asked for."""
    settings: dict[str, Any] = dict(normalize_gen_kwargs(given, lm.max_gen_toks))
    settings["until"] = [stop for stop in handle_stop_sequences(settings.get("until"), eos=lm.end_of_text) if stop]
    if settings.get("temperature", 0.0) == 0.0 and not settings["do_sample"]:
        settings.pop("temperature", None)
    settings.pop("max_length", None)
    for alone in ("num_beams", "num_return_sequences"):
        if settings.pop(alone, 1) != 1:
            raise EvaluationError(f"{name} wants {alone} {given[alone]}: answers are one token sequence each here")
    return settings


def _floor(count: int, unit: int) -> int:
    return count // unit * unit


def _name(instance: Instance) -> str:
    return f"{instance.task_name}/{instance.doc_id}/{instance.idx}"
