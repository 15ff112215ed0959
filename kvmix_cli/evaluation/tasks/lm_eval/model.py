"""The model `kvmix` of lm-eval.

Importing this registers it, and then lm-eval finds it by its name:

    lm_eval.simple_evaluate(model="kvmix", model_args={"pretrained": MODEL, "plan": PLAN}, tasks=[...])

`kvmix eval` does more: it measures the unquantized cache beside it, keeps every answer, and can be interrupted.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ....cache.subject import AttendedPairs, Subject
from ....errors import EvaluationError
from ....models.loading import LoadedModel, load_model
from ....plan import Plan
from ....texts.chat import chat_turn, prompt_ids
from ....texts.tokens import encode
from .answers import Answerer, parse_batch_size
from .boundary import quiet
from .requests import GENERATE, ROLL, SCORE, encode_requests, merge_replies

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

STEP = 32
DEFAULT_DEVICE = "cuda:0"
"""The device of lm-eval's own command if none is given; without a GPU its model `hf` uses the CPU instead."""

logger = logging.getLogger("lm_eval.kvmix")


class LMInfo(TypedDict):
    """The model's part of `results["config"]`, which lm-eval writes beside its results."""

    model_id: str
    model_dtype: str
    model_revision: str | None
    plan: str | None
    nominal_bits: float
    stored_bits: float | None
    quantized_share: float


@register_model("kvmix")
class KvmixLM(HFLM):
    """lm-eval's Hugging Face model, with every answer read through a cache at the bits of a plan.

    Prompts become tokens as in HFLM, except that no end token follows a text; the model's passes are kvmix's own.

    Args:
        pretrained: hub id, local folder, `builtin:tiny`, or a model that `load_model` has loaded.
        plan: a plan file, or its short form `0-3:k4v4,4-7:k2v2`; none for the unquantized cache.
        subject: a subject whose cache is used instead of a plan's.
        step: tokens that are fed at a time where a continuation is scored; 1 is exact decoding.
        batch_size: `auto`, or the most requests in a batch.
        max_length: tokens of a prompt and its answer; the model's limit if not given.
        seed: of answers that are sampled.

    Raises:
        KvmixError: if the model or the plan cannot be used.
    """

    cache_hook: CacheHook

    def __init__(
        self,
        pretrained: str | LoadedModel,
        plan: str | Path | None = None,
        *,
        subject: Subject | None = None,
        step: int = STEP,
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        trust_remote_code: bool = False,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(pretrained, str):
            if device == DEFAULT_DEVICE and not torch.cuda.is_available():
                device = "auto"
            pretrained = load_model(
                pretrained, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
        self.loaded = pretrained
        self.step = int(step)
        self.subject = subject or _subject(plan, pretrained)
        with quiet():
            super().__init__(
                pretrained=pretrained.model,
                tokenizer=copy.deepcopy(pretrained.tokenizer),  # HFLM gives it a padding token
                max_length=max_length or pretrained.max_length,
                add_bos_token=add_bos_token,
                prefix_token_id=prefix_token_id,
            )
        if self.prefix_token_id is None:
            raise EvaluationError(f"the tokenizer of {pretrained.info.id} has no token to begin or end a text with")
        rows = parse_batch_size(batch_size, max_batch_size)
        self._answerer = Answerer(pretrained, self.subject, self.step, rows, int(seed))
        self._attended = AttendedPairs(total=0, quantized=0)
        self._pairs: list[tuple[list[int], list[int]]] = []

    @property
    def end_of_text(self) -> str:
        """Return the text that ends every answer."""
        token = self.eot_token_id
        return "" if token is None else str(self.tok_decode(token, skip_special_tokens=False))

    @property
    def quantized_share(self) -> float:
        """Return the share of quantized tokens among the (query, cached token) pairs that attention has read so far."""
        return self._attended["quantized"] / self._attended["total"] if self._attended["total"] else 0.0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """See `HFLM.tok_encode`; without the end token that a tokenizer may put after a text."""
        ids: list[int] = super().tok_encode(string, add_special_tokens, **kwargs)
        if self._adds_end and ids == self.tokenizer(string, verbose=False).input_ids:
            return prompt_ids(self.tokenizer, string)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt; those of an empty context for an empty text."""
        if not text:
            return [self.prefix_token_id]
        if self.add_bos_token is False or has_bos_prefix(text, self.tokenizer.bos_token):
            return encode(self.tokenizer, text)
        return prompt_ids(self.tokenizer, text)

    def encode_pairs(self, kind: str, instance: Instance) -> list[tuple[list[int], list[int]]]:
        """Return the token ids of context and continuation for each pass that HFLM would make."""
        self._pairs = []
        hook, self.cache_hook = self.cache_hook, CacheHook(None)  # nothing has been answered yet
        try:
            (super().loglikelihood if kind == SCORE else super().loglikelihood_rolling)([instance], disable_tqdm=True)
        finally:
            self.cache_hook = hook
        return self._pairs

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See `HFLM.apply_chat_template`. Raises TextError for a template that fails or leaves out a user's words."""
        chat_turn(self.tokenizer, self.loaded.info.id)
        return str(super().apply_chat_template(chat_history, add_generation_prompt))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`."""
        return self._replies(GENERATE, requests, disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`."""
        return self._replies(SCORE, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `LM.loglikelihood_rolling`."""
        return self._replies(ROLL, requests, disable_tqdm)

    def get_model_info(self) -> LMInfo:
        """Return what lm-eval writes beside its results."""
        nominal, stored = self.subject.bits
        if self.subject != Subject() and not self.quantized_share:
            logger.warning("nothing quantized was read: the plan's sink, window and page hold every context whole")
        return LMInfo(
            model_id=self.loaded.info.id,
            model_dtype=self.loaded.dtype,
            model_revision=self.loaded.info.revision,
            plan=None if self.subject.plan is None else self.subject.plan.short,
            nominal_bits=nominal,
            stored_bits=stored,
            quantized_share=self.quantized_share,
        )

    @cached_property
    def _adds_end(self) -> bool:
        return len(prompt_ids(self.tokenizer, "a")) < len(self.tokenizer("a", verbose=False).input_ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Record the tokens of a pass that HFLM would make here; they are fed through the cache later."""
        self._pairs += [(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)

    def _replies(self, kind: str, instances: Sequence[Instance], silent: bool) -> list[Any]:
        requests = encode_requests(self, kind, instances)
        answers = list(tqdm(self._answerer.answers(requests), f"kvmix: {kind}", len(requests), disable=silent))
        for answer in answers:
            self._attended["total"] += answer.attended["total"]
            self._attended["quantized"] += answer.attended["quantized"]
        values = (answer.value for answer in answers)
        return merge_replies(kind, len(instances), zip(requests, values, strict=True))


def _subject(plan: str | Path | None, loaded: LoadedModel) -> Subject:
    if plan is None:
        return Subject()
    path = Path(plan)
    if not path.is_file():
        return Subject(str(plan), Plan.from_short(str(plan), loaded.info))
    found = Plan.load(path)
    found.check_model(loaded.info)
    return Subject(path.stem, found)
