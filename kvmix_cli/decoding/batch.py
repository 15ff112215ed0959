"""Batches of prompts that share one cache: answers that are generated, and continuations that are scored.

Nothing is ever padded before a row. Padding on the left would take the places of the sink, shift every page, and lie in
the quantization groups of real tokens. So all rows of a batch have the same number of prefilled tokens; what follows
them may differ in length and is fed through the cache, as decoded tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..cache.subject import AttendedPairs, attended
from ..models.memory import attempt
from ..texts.tokens import encode
from .feed import prefill
from .settings import continue_tokens, greedy_settings, reserve

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

    from ..cache.subject import Subject
    from ..errors import KvmixError
    from ..models.loading import LoadedModel

Item = TypeVar("Item")
Result = TypeVar("Result")

LOOK_BACK = 2
"""Tokens that are searched for a stop text beyond as many as it has itself: a model may spell it with more of them."""
NOT_SCORED = -100
"""Target of a token whose loss does not count, as in `cross_entropy`."""


@dataclass(frozen=True)
class StopRule:
    """The end of an answer.

    Attributes:
        max_new_tokens: most tokens of an answer.
        tokens: ids that end an answer, each of them part of it.
        texts: texts that end an answer, even where a token has more than the text.
        min_new_tokens: tokens that an answer has at least before one of `tokens` may follow.
    """

    max_new_tokens: int
    tokens: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    min_new_tokens: int = 0


@dataclass(frozen=True)
class BatchAnswers:
    """Generated answers to a batch of prompts.

    Attributes:
        tokens: the ids of each answer, the one that ended it included.
        attended: pairs of a query and a cached token that attention has read, a row's equal part; see
            `cache.subject.attended`.
    """

    tokens: list[list[int]]
    attended: AttendedPairs


@dataclass(frozen=True)
class BatchScores:
    """Log-likelihoods of a batch of continuations.

    Attributes:
        log_likelihoods: in nats, the sum over a row's scored tokens; NaN or infinite if the model's logits are.
        greedy: whether greedy decoding would give the scored tokens.
        attended: as in `BatchAnswers`.
    """

    log_likelihoods: list[float]
    greedy: list[bool]
    attended: AttendedPairs


def generate_batch(
    loaded: LoadedModel,
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    prefilled: int,
    stop: StopRule,
    sampling: Mapping[str, Any] | None = None,
) -> BatchAnswers:
    """Generate an answer to each prompt through one fresh cache.

    The first `prefilled` tokens of every prompt are prefilled, and must be fewer than the shortest prompt has. What is
    left of a prompt is fed token by token through the cache, and each row begins its answer where its own prompt ends.
    So the first token of every answer comes from a query that has read quantized keys and values.

    Args:
        sampling: settings such as `do_sample` and `temperature`; greedy without them.

    Raises:
        TextError: if the embedding does not have one of the ids.
    """
    loaded.check_ids(prompts)
    longest = max(map(len, prompts))
    cache = prefill_batch(
        loaded, subject, [prompt[:prefilled] for prompt in prompts], reserve(longest, stop.max_new_tokens)
    )
    first = torch.tensor([prompt[: prefilled + 1] for prompt in prompts], device=loaded.device)
    ends = _AnswerEnds(loaded, prompts, stop)
    new_tokens = longest + stop.max_new_tokens - first.shape[1]
    settings = greedy_settings(loaded, new_tokens, ends=(), **(sampling or {}))  # a prompt may have end tokens inside
    rows = continue_tokens(
        loaded,
        first,
        cache,
        settings,
        logits_processor=LogitsProcessorList([_PromptTokens(prompts, stop)]),
        stopping_criteria=StoppingCriteriaList([ends]),
    ).tolist()
    tokens = [
        row[len(prompt) : len(prompt) + length] for row, prompt, length in zip(rows, prompts, ends.lengths, strict=True)
    ]
    return BatchAnswers(tokens, _attended_by_row(cache, len(prompts)))


@torch.inference_mode()
def score_batch(
    loaded: LoadedModel,
    subject: Subject,
    rows: Sequence[Sequence[int]],
    scored: Sequence[int],
    prefilled: int,
    step: int,
) -> BatchScores:
    """Score the last tokens of each row, which are teacher-forced through one fresh cache `step` at a time.

    Shorter rows are padded after their end, where none of their own tokens looks.

    Args:
        rows: ids of a context and its continuation; the very last id is only predicted.
        scored: tokens at the end of each row whose log-likelihood is summed.
        prefilled: tokens at the start of every row that enter the cache at once.

    Raises:
        TextError: if the embedding does not have one of the ids.
    """
    loaded.check_ids(rows)
    stop = max(map(len, rows)) - 1
    cache = prefill_batch(loaded, subject, [row[:prefilled] for row in rows], reserve=stop)
    inputs, targets = (side.to(loaded.device) for side in _inputs_and_targets(rows, scored, prefilled, stop))
    losses = torch.zeros(len(rows), dtype=torch.float64, device=loaded.device)
    greedy = torch.ones(len(rows), dtype=torch.bool, device=loaded.device)
    for start in range(0, stop - prefilled, step):
        wanted = targets[:, start : start + step]
        logits = loaded.model(
            input_ids=inputs[:, start : start + step], past_key_values=cache, use_cache=True, return_dict=True
        ).logits.float()
        loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=NOT_SCORED, reduction="none")
        losses += loss.view_as(wanted).double().sum(1)
        greedy &= ((logits.argmax(-1) == wanted) | (wanted == NOT_SCORED)).all(1)
    return BatchScores((-losses).tolist(), greedy.tolist(), _attended_by_row(cache, len(rows)))


@torch.inference_mode()
def prefill_batch(loaded: LoadedModel, subject: Subject, contexts: Sequence[Sequence[int]], reserve: int) -> Cache:
    """Return a fresh cache that holds contexts of the same length; one that several rows share is computed once.

    Args:
        reserve: tokens to make room for.
    """
    cache = subject.cache(loaded.config, reserve=reserve)
    rows = [tuple(context) for context in contexts]
    if not rows[0]:
        return cache
    distinct = list(dict.fromkeys(rows)) if subject.baseline is None else rows
    prefill(loaded, cache, torch.tensor(distinct, device=loaded.device))
    if len(distinct) < len(rows):
        places = {row: place for place, row in enumerate(distinct)}
        cache.reorder_cache(torch.tensor([places[row] for row in rows], device=loaded.device))
    return cache


def run_in_batches(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Sequence[Result]],
    *,
    take: Callable[[Sequence[Item]], Sequence[Item]],
    size: int,
    least: int,
    device: torch.device,
    too_large: Callable[[Sequence[Item]], KvmixError],
) -> Iterator[Result]:
    """Yield the result of each item, worked on in batches that become smaller whenever memory runs out.

    Args:
        work: gives one result for each item of a batch.
        take: chooses the batch that a list of at most `size` items begins with.
        size: most items of a batch.
        least: number of items down to which a batch is halved.
        too_large: makes the error for a batch that cannot be halved.

    Raises:
        KvmixError: as made by `too_large`, after the results before it.
    """
    done = 0
    while done < len(items):
        batch = take(items[done : done + size])
        results = attempt(partial(work, batch), {device})
        if results is not None:
            yield from results
            done += len(batch)
        elif len(batch) > least:
            size = len(batch) // 2
        else:
            raise too_large(batch)


class _PromptTokens:
    """A logits processor that gives a row its prompt's next token, and no end token before the fewest that are due."""

    def __init__(self, prompts: Sequence[Sequence[int]], stop: StopRule) -> None:
        self.prompts = prompts
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1]
        inside = [row for row, prompt in enumerate(self.prompts) if at < len(prompt)]
        if inside:
            scores[inside] = -torch.inf
            scores[inside, [self.prompts[row][at] for row in inside]] = 0.0
        for row, prompt in enumerate(self.prompts):
            if len(prompt) <= at < len(prompt) + self.stop.min_new_tokens:
                scores[row, list(self.stop.tokens)] = -torch.inf
        return scores


class _AnswerEnds:
    """A stopping criterion that watches each row's answer.

    Attributes:
        lengths: tokens of each answer so far, the one that ends it included.
    """

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], stop: StopRule) -> None:
        self.tokenizer = loaded.tokenizer
        self.starts = [len(prompt) for prompt in prompts]
        self.stop = stop
        self.lengths = [0] * len(prompts)
        self.over = [False] * len(prompts)
        self.tail = max((len(encode(loaded.tokenizer, text)) for text in stop.texts), default=0) + LOOK_BACK

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        at = input_ids.shape[1]
        for row, recent in enumerate(input_ids[:, -self.tail :].tolist()):
            length = at - self.starts[row]
            if length > 0 and not self.over[row]:
                self.lengths[row] = length
                self.over[row] = self._ends(recent[-length:], length)
        return torch.tensor(self.over, device=input_ids.device)

    def _ends(self, recent: list[int], length: int) -> bool:
        if length >= self.stop.max_new_tokens or recent[-1] in self.stop.tokens:
            return True
        if not self.stop.texts:
            return False
        tail = self.tokenizer.decode(recent)
        return any(text in tail for text in self.stop.texts)


def _inputs_and_targets(
    rows: Sequence[Sequence[int]], scored: Sequence[int], start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Return the ids to feed and the ids that follow them, both `[rows, stop - start]`."""
    inputs = torch.zeros(len(rows), stop - start, dtype=torch.long)
    targets = torch.full_like(inputs, NOT_SCORED)
    for number, (row, count) in enumerate(zip(rows, scored, strict=True)):
        length = len(row) - 1 - start
        inputs[number, :length] = torch.tensor(row[start:-1])
        targets[number, length - count : length] = torch.tensor(row[-count:])
    return inputs, targets


def _attended_by_row(cache: Cache, rows: int) -> AttendedPairs:
    found = attended(cache)
    return AttendedPairs(total=found["total"] / rows, quantized=found["quantized"] / rows)
