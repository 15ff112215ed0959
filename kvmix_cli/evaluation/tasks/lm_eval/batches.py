"""Answering requests in batches that fit into memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from ....errors import EvaluationError
from .generate import generate
from .requests import GENERATE, Request
from .score import score

if TYPE_CHECKING:
    from ....cache.subject import Subject
    from ....models.loading import LoadedModel

CPU_ROWS, CPU_TOKENS = 8, 16384
"""`--batch-size auto` on a CPU: where memory does not run out with an error that could be caught."""
DEVICE_ROWS = 64
"""`--batch-size auto` elsewhere: halved whenever memory runs out."""


@dataclass(frozen=True)
class Answer:
    """Of one pass through the cache.

    Attributes:
        value: text, or a log-likelihood in nats and whether greedy decoding would have said the same.
        tokens: generated, or scored.
        attended: see `cache.subject.attended`; its batch's share.
    """

    value: str | list[float | bool]
    tokens: int
    attended: dict[str, float]


@dataclass(frozen=True)
class Reading:
    """How requests are read: by which model, through whose cache.

    Attributes:
        step: tokens that are fed at a time where a continuation is scored.
        rows: the most requests in a batch; None for a number that fits.
        seed: of answers that are sampled.
    """

    loaded: LoadedModel
    subject: Subject
    step: int
    rows: int | None = None
    seed: int = 0

    def answers(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """One answer for each request, in their order.

        Raises:
            EvaluationError: if a single request does not fit into memory, or an answer is not a number.
        """
        most = self.rows or (CPU_ROWS if self.loaded.device.type == "cpu" else DEVICE_ROWS)
        done = 0
        while done < len(requests):
            batch = self._next(requests[done : done + most])
            answers = self._answers(batch)
            if answers is None:
                if len(batch) == 1:
                    raise EvaluationError(_too_large(batch[0], self.loaded))
                most = len(batch) // 2
                continue
            yield from answers
            done += len(batch)

    def _next(self, requests: Sequence[Request]) -> list[Request]:
        """The longest batch that `requests` begin with."""
        first = requests[0]
        rows = len(requests)
        if self.rows is None and self.loaded.device.type == "cpu":
            rows = max(1, min(rows, CPU_TOKENS // max(1, len(first.ids))))
        return list(takewhile(lambda each: each.batch == first.batch, requests[:rows]))

    def _answers(self, batch: list[Request]) -> list[Answer] | None:
        """None if memory has run out, of which nothing is held when this returns."""
        try:
            if batch[0].kind == GENERATE:
                texts, attended = generate(self.loaded, self.subject, batch, self.seed)
                return [Answer(text, tokens, attended) for text, tokens in texts]
            scores, attended = score(self.loaded, self.subject, batch, self.step)
            return [Answer(list(value), each.scored, attended) for value, each in zip(scores, batch, strict=True)]
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def rows(batch_size: int | str | None, most: int | None = None) -> int | None:
    """A batch size as `Reading` wants it. lm-eval also writes `auto:4`, which asks it to look again now and then.

    Raises:
        EvaluationError: if it is none.
    """
    text = str(batch_size)
    if batch_size is None or text.partition(":")[0] == "auto":
        return most
    if not text.isdigit() or text == "0":
        raise EvaluationError(f"'{batch_size}' is no batch size; use a number or auto")
    return int(text)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _too_large(request: Request, loaded: LoadedModel) -> str:
    return (
        f"out of memory at {request.name} alone, {len(request.ids)} tokens on {loaded.device}; what was measured "
        "before is kept: use --resume where there is more memory, or start over with a smaller --max-length"
    )
