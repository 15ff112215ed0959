"""Answers that are decoded through the cache, several prompts at a time."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ....quiet import hushed
from .rows import enter, shares

if TYPE_CHECKING:
    from ....cache.subject import Subject
    from ....models.loading import LoadedModel
    from .requests import Request

LOOK_BACK = 2
"""Tokens more than a stop sequence has, that are searched for it: a model may spell it differently."""


def generate(
    loaded: LoadedModel, subject: Subject, batch: Sequence[Request], seed: int
) -> tuple[list[tuple[str, int]], dict[str, float]]:
    """Each prompt's answer and how many tokens it took; and a row's share of attention.

    All prompts are prefilled up to the same token. What is left of each is then fed token by token, through the cache,
    and every row goes over to its answer when its own prompt has ended. So the first token of an answer has read
    quantized keys and values, and a row in a batch reads what it would read alone.
    """
    settings: dict[str, Any] = json.loads(batch[0].generation)
    until, most = settings.pop("until"), settings.pop("max_gen_toks")
    longest = max(len(request.ids) for request in batch) + most
    prompts = [list(request.ids) for request in batch]
    ends = _Ends(loaded, prompts, until, most)
    torch.manual_seed(zlib.crc32(f"{seed}/{batch[0].owner}/{batch[0].name}".encode()))
    with torch.inference_mode(), hushed():
        cache = enter(loaded, subject, batch, reserve=longest)
        ids = torch.tensor([prompt[: batch[0].prefill + 1] for prompt in prompts], device=loaded.device)
        found = loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=longest - ids.shape[1],
            eos_token_id=None,  # a prompt may have it inside: `_Ends` knows
            pad_token_id=0,  # there is none
            logits_processor=LogitsProcessorList([_Prompts(prompts)]),
            stopping_criteria=StoppingCriteriaList([ends]),
            **settings,
        ).tolist()
    answers = []
    for row, prompt, tokens in zip(found, prompts, ends.tokens, strict=True):
        text = loaded.tokenizer.decode(row[len(prompt) : len(prompt) + tokens], skip_special_tokens=True)
        answers.append((postprocess_generated_text(text, until, None), tokens))
    return answers, shares(cache, len(batch))


class _Prompts(LogitsProcessor):
    """A row that is still inside its prompt gets the prompt's next token, whatever the model says."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.prompts = prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1]
        rows = [row for row, prompt in enumerate(self.prompts) if at < len(prompt)]
        if rows:
            scores[rows] = -torch.inf
            scores[rows, [self.prompts[row][at] for row in rows]] = 0.0
        return scores


class _Ends(StoppingCriteria):
    """When each row's answer is over: at a stop sequence, at the end of text, or at the most tokens it may have.

    Attributes:
        tokens: of each answer so far, the one that ends it included.
    """

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], until: Sequence[str], most: int) -> None:
        self.tokenizer = loaded.tokenizer
        self.starts = [len(prompt) for prompt in prompts]
        self.until = until
        self.most = most
        self.end_of_text = _end_tokens(loaded)
        self.tokens = [0] * len(prompts)
        self.over = [False] * len(prompts)
        sizes = [len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in until]
        self.tail = max(sizes, default=0) + LOOK_BACK

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        shared = min(self.starts)
        for row, ids in enumerate(input_ids[:, shared:].tolist()):
            answer = ids[self.starts[row] - shared :]
            if answer and not self.over[row]:
                self.tokens[row] = len(answer)
                self.over[row] = self._is_over(answer)
        return torch.tensor(self.over, device=input_ids.device)

    def _is_over(self, answer: list[int]) -> bool:
        if len(answer) >= self.most or answer[-1] in self.end_of_text:
            return True
        tail = self.tokenizer.decode(answer[-self.tail :])
        return any(stop in tail for stop in self.until)


def _end_tokens(loaded: LoadedModel) -> set[int]:
    """All tokens that end a text, by the tokenizer and by the model's own settings."""
    listed = loaded.model.generation_config.eos_token_id
    tokens = listed if isinstance(listed, list) else [listed]
    return {token for token in (*tokens, loaded.tokenizer.eos_token_id) if token is not None}
