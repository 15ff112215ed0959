"""Answers to lm-eval's requests, read through a subject's cache in batches that fit into memory."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from lm_eval.models.utils import postprocess_generated_text

from ....decoding.batch import StopRule, generate_batch, run_in_batches, score_batch
from ....decoding.settings import end_tokens
from ....errors import EvaluationError
from .requests import GENERATE, TokenRequest

if TYPE_CHECKING:
    from ....cache.subject import AttendedPairs, Subject
    from ....models.loading import LoadedModel

CPU_ROWS, CPU_TOKENS = 8, 16384
"""`--batch-size auto` on a CPU, where the system may end the program before an error can be caught."""
DEVICE_ROWS = 64
"""`--batch-size auto` elsewhere: halved whenever memory runs out."""


@dataclass(frozen=True)
class RequestAnswer:
    """The answer to one request.

    Attributes:
        value: text, or a log-likelihood in nats and whether greedy decoding would give the same tokens.
        tokens: number of tokens that were generated, or scored.
        attended: pairs that attention has read, see `cache.subject.attended`; the request's part of its batch.
    """

    value: str | list[float | bool]
    tokens: int
    attended: AttendedPairs


@dataclass(frozen=True)
class Answerer:
    """A model and a subject whose cache answers requests.

    Attributes:
        step: tokens that are fed at a time where a continuation is scored.
        rows: most requests in a batch; None for a number that fits into memory.
        seed: of answers that are sampled.
    """

    loaded: LoadedModel
    subject: Subject
    step: int
    rows: int | None = None
    seed: int = 0

    def answers(self, requests: Sequence[TokenRequest]) -> Iterator[RequestAnswer]:
        """Yield one answer for each request, in their order.

        Raises:
            EvaluationError: if a single request does not fit into memory, or a log-likelihood is not a number.
        """
        return run_in_batches(
            requests,
            self._answer,
            take=self._take,
            size=self.rows or (CPU_ROWS if self.loaded.device.type == "cpu" else DEVICE_ROWS),
            least=1,
            device=self.loaded.device,
            too_large=self._too_large,
        )

    def _take(self, requests: Sequence[TokenRequest]) -> Sequence[TokenRequest]:
        first, rows = requests[0], len(requests)
        if self.rows is None and self.loaded.device.type == "cpu":
            rows = max(1, min(rows, CPU_TOKENS // max(1, len(first.ids))))
        return list(takewhile(lambda each: each.batch == first.batch, requests[:rows]))

    def _answer(self, batch: Sequence[TokenRequest]) -> list[RequestAnswer]:
        return self._generate(batch) if batch[0].kind == GENERATE else self._score(batch)

    def _generate(self, batch: Sequence[TokenRequest]) -> list[RequestAnswer]:
        first = batch[0]
        settings = json.loads(first.generation)
        until = settings.pop("until")
        stop = StopRule(settings.pop("max_gen_toks"), tuple(end_tokens(self.loaded)), tuple(until))
        torch.manual_seed(zlib.crc32(f"{self.seed}/{first.owner}/{first.name}".encode()))
        prompts = [request.ids for request in batch]
        found = generate_batch(self.loaded, self.subject, prompts, first.prefill, stop, settings)
        texts = (self.loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in found.tokens)
        return [
            RequestAnswer(postprocess_generated_text(text, until, None), len(ids), found.attended)
            for text, ids in zip(texts, found.tokens, strict=True)
        ]

    def _score(self, batch: Sequence[TokenRequest]) -> list[RequestAnswer]:
        ids, scored = [request.ids for request in batch], [request.scored for request in batch]
        found = score_batch(self.loaded, self.subject, ids, scored, batch[0].prefill, self.step)
        for request, value in zip(batch, found.log_likelihoods, strict=True):
            if not math.isfinite(value):
                raise EvaluationError(
                    f"the log-likelihood of {request.name} is {value:g}, not a finite number; try another --dtype"
                )
        return [
            RequestAnswer([value, greedy], request.scored, found.attended)
            for request, value, greedy in zip(batch, found.log_likelihoods, found.greedy, strict=True)
        ]

    def _too_large(self, batch: Sequence[TokenRequest]) -> EvaluationError:
        (request,) = batch
        return EvaluationError(
            f"out of memory at {request.name} alone, {len(request.ids)} tokens on {self.loaded.device}; the answers "
            "before it are kept: use --resume on a machine with more memory, or start over with a smaller --max-length"
        )


def parse_batch_size(batch_size: int | str | None, most: int | None = None) -> int | None:
    """Return the number of rows that a batch size stands for; `most` for `auto` and for none.

    lm-eval also writes `auto:4`, which asks it to measure the size again now and then.

    Raises:
        EvaluationError: if it is neither a positive number nor `auto`.
    """
    text = str(batch_size)
    if batch_size is None or text.partition(":")[0] == "auto":
        return most
    if not text.isdigit() or text == "0":
        raise EvaluationError(f"--batch-size '{batch_size}': expected a number of at least 1, or auto")
    return int(text)
