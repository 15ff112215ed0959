"""The log-likelihood of continuations that are teacher-forced through the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from ....errors import EvaluationError
from .rows import enter, shares

if TYPE_CHECKING:
    from ....cache.subject import Subject
    from ....models.loading import LoadedModel
    from .requests import Request

NOT_SCORED = -100


@torch.inference_mode()
def score(
    loaded: LoadedModel, subject: Subject, batch: Sequence[Request], step: int
) -> tuple[list[tuple[float, bool]], dict[str, float]]:
    """Each row's log-likelihood (nats) and whether it is what greedy decoding says; and a row's share of attention.

    Shorter rows are padded after their end, where none of their own tokens looks.

    Raises:
        EvaluationError: if a log-likelihood is not finite.
    """
    start, stop = batch[0].prefill, max(len(request.ids) for request in batch) - 1
    cache = enter(loaded, subject, batch, reserve=stop)
    inputs, targets = (side.to(loaded.device) for side in _sides(batch, start, stop))
    losses = torch.zeros(len(batch), dtype=torch.float64, device=loaded.device)
    greedy = torch.ones(len(batch), dtype=torch.bool, device=loaded.device)
    for ids, wanted in zip(inputs.split(step, dim=1), targets.split(step, dim=1), strict=True):
        logits = loaded.model(input_ids=ids, past_key_values=cache, use_cache=True).logits.float()
        loss = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=NOT_SCORED, reduction="none")
        losses += loss.view_as(wanted).double().sum(1)
        greedy &= ((logits.argmax(-1) == wanted) | (wanted == NOT_SCORED)).all(1)
    answers = [(-loss, said) for loss, said in zip(losses.tolist(), greedy.tolist(), strict=True)]
    for request, (value, _) in zip(batch, answers, strict=True):
        if not math.isfinite(value):
            raise EvaluationError(f"the log-likelihood of {request.name} is {value:g}; try another --dtype")
    return answers, shares(cache, len(batch))


def _sides(batch: Sequence[Request], start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to feed and the tokens that follow them, `[rows, stop - start]`."""
    inputs = torch.zeros(len(batch), stop - start, dtype=torch.long)
    targets = torch.full_like(inputs, NOT_SCORED)
    for row, request in enumerate(batch):
        end = len(request.ids) - 1
        inputs[row, : end - start] = torch.tensor(request.ids[start:end])
        targets[row, end - start - request.scored : end - start] = torch.tensor(request.ids[-request.scored :])
    return inputs, targets
